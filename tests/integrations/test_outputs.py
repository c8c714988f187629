"""The logits in what networks return."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crossmix import MeanTeacher, recipes
from crossmix import functional as F
from crossmix.integrations import semantic_logits
from oracles import seeded


def query_output(n: int = 2, queries: int = 5, num_classes: int = 4, size: tuple[int, int] = (3, 4)) -> SimpleNamespace:
    g = seeded(0)
    return SimpleNamespace(
        class_queries_logits=3 * torch.randn(n, queries, num_classes + 1, generator=g),
        masks_queries_logits=5 * torch.randn(n, queries, *size, generator=g),
    )


def test_semantic_logits__softmax_is_the_share_of_the_summed_masks() -> None:
    output = query_output()
    got = semantic_logits(output).softmax(1)
    classes = output.class_queries_logits.double().softmax(2)
    for i, row, column in np.ndindex(2, 3, 4):
        scores = [
            sum(
                float(classes[i, q, c]) / (1 + float(np.exp(-float(output.masks_queries_logits[i, q, row, column]))))
                for q in range(5)
            )
            for c in range(4)
        ]
        want = torch.tensor([score / sum(scores) for score in scores])
        torch.testing.assert_close(got[i, :, row, column], want, rtol=1e-4, atol=1e-5)


def test_semantic_logits__the_scores_themselves_never_reach_the_threshold() -> None:
    """The reason for the function: in [0, 1] the softmax of C scores is at most e / (e + C - 1)."""
    output = query_output(num_classes=19, queries=19)
    output.class_queries_logits = 30 * torch.eye(19, 20).expand(2, -1, -1)  # query q is sure of class q
    output.masks_queries_logits = torch.full((2, 19, 3, 4), -30.0)
    output.masks_queries_logits[:, 7] = 30  # and query 7 covers the image
    classes = output.class_queries_logits.softmax(-1)[..., :-1]
    scores = torch.einsum("nqc,nqhw->nchw", classes, output.masks_queries_logits.sigmoid())
    assert F.pseudo_label(scores).confidence.max() < 0.14
    right = F.pseudo_label(semantic_logits(output))
    assert right.confidence.min() > 0.999
    assert (right.labels == 7).all()


def test_semantic_logits__gradients_are_finite_where_no_mask_is() -> None:
    output = query_output()
    for name in ("class_queries_logits", "masks_queries_logits"):
        setattr(output, name, (1e4 * getattr(output, name)).requires_grad_())
    loss = nn.functional.cross_entropy(semantic_logits(output), torch.zeros(2, 3, 4, dtype=torch.long))
    loss.backward()
    assert loss.isfinite()
    assert output.class_queries_logits.grad.isfinite().all()
    assert output.masks_queries_logits.grad.isfinite().all()


def test_semantic_logits__are_float32_under_autocast() -> None:
    output = query_output()
    with torch.autocast("cpu", torch.bfloat16):
        got = semantic_logits(output)
    assert torch.equal(got, semantic_logits(output))


def test_semantic_logits__are_found() -> None:
    logits = torch.randn(2, 4, 3, 3)
    for output in (logits, SimpleNamespace(logits=logits), {"logits": logits}, {"out": logits}):
        assert semantic_logits(output) is logits


def test_semantic_logits__says_what_it_looked_for() -> None:
    with pytest.raises(TypeError, match=r"must hold `logits`, `out`, or .* got dict with keys 'scores'"):
        semantic_logits({"scores": torch.zeros(1)})


class Queries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classes, self.masks = nn.Conv2d(3, 6 * 5, 1), nn.Conv2d(3, 6, 2, 2)

    def forward(self, images: Tensor) -> SimpleNamespace:
        classes = self.classes(images).mean((2, 3)).unflatten(1, (6, 5))
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=self.masks(images))


@pytest.mark.parametrize("network", [Queries(), nn.Conv2d(3, 4, 1)], ids=["queries", "logits"])
def test_errors__name_an_expression_that_works(network: nn.Module) -> None:
    """What the hints say, pasted: for `SelfTraining` and for the teacher."""
    if isinstance(network, nn.Conv2d):
        network = nn.Sequential(network, Wrapped())
    images, labels = torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
    with pytest.raises(TypeError) as refused:
        recipes.self_training(network, 4)(images, labels, images)
    import crossmix.integrations

    found = re.search(r"pass `logits=(.*)` to SelfTraining", str(refused.value))
    assert found is not None
    logits = eval(found[1], {"crossmix": crossmix})  # noqa: S307 - our own message
    recipes.self_training(network, 4, logits=logits, upsample=True)(images, labels, images).loss.backward()

    teacher = MeanTeacher(network)
    with pytest.raises(TypeError) as refused:
        teacher.pseudo_label(images)
    found = re.search(r"network's output: (.*)\. Logits smaller", str(refused.value))
    assert found is not None
    pseudo = eval(found[1], {"crossmix": crossmix, "output": teacher(images)})  # noqa: S307
    assert pseudo.labels.shape[0] == 2


class Wrapped(nn.Module):
    def forward(self, logits: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=logits)
