"""A task of your own: problems made up by a function, answers scored by another."""

import random
import tempfile
from pathlib import Path

from esr_train.config import Config
from esr_train.experiment import load_experiment
from esr_train.tasks import Problem
from esr_train.train import Trainer


class EasySums:
    """Sums of multiples of ten; on the command line data.task=custom_task:EasySums."""

    name = "easy sums"

    def count(self, split):
        return None  # as many as are asked for

    def problems(self, split, count, seed):
        draw = random.Random(f"{split}:{seed}").randint
        rows = [[draw(1, 9) * 10 for _ in range(4)] for _ in range(count)]
        return [Problem("+".join(map(str, row)) + "=", str(sum(row))) for row in rows]

    def score(self, problem, response):
        said = response.rpartition("is ")[2].strip(".")
        return {"accuracy": float(said == problem.answer), "a_number": float(said.isdigit())}


if __name__ == "__main__":
    settings = {who: {"model": f"builtin:sums-{who}"} for who in ("student", "teacher")}
    settings |= {"data": {"task": "custom_task:EasySums"}, "optim": {"lr": 3e-5}, "steps": 3}
    settings |= {"rollout": {"max_new_tokens": 16}, "eval": {"every": 3, "problems": 4}}
    config = Config.model_validate(settings)
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(config, load_experiment(config), Path(out), seed=0, save=False)
        trainer.on_step = lambda row, scores: print(f"divergence {row['divergence']:.3f}", scores)
        trainer.run()
