"""On the built-in pair, the fused loss trains as plain PyTorch does."""

from bench.training_curve import curves, largest_difference


def test_fused_and_plain_loss_give_the_same_curve():
    by_name = curves(steps=4, length=16)
    difference = largest_difference(by_name)
    print(f"largest relative difference over 4 steps: {difference:.1e}")
    assert len(by_name["fused"]) == 4 and by_name["fused"][0] > 0.01
    assert by_name["fused"][-1] != by_name["fused"][0]
    assert difference < 1e-4
