"""Replayed augmentations, and those of kornia and torchvision in a step."""

import copy
import pickle
from collections.abc import Callable

import kornia.augmentation as K
import pytest
import torch
from torch import Tensor, nn

from checks import needed
from crossmix import CrossDomainMix, MeanTeacher, SelfTraining, StrongAugment, recipes
from crossmix.integrations import SeededAugment
from oracles import seeded, small_network

C = 5
AUGMENTS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "function": lambda: noise,
    "jiggle": lambda: K.ColorJiggle(0.3, 0.3, 0.3, 0.3, p=1.0),
    "jitter": lambda: K.ColorJitter(0.3, 0.3, 0.3, 0.3, p=0.7),
    "blur": lambda: K.RandomGaussianBlur((3, 3), (0.1, 2.0), p=0.5),
    "grey": lambda: K.RandomGrayscale(p=0.5),
    "noise": lambda: K.RandomGaussianNoise(0.0, 0.05, p=1.0),
    "posterize": lambda: K.RandomPosterize(3, p=0.5),
    "sequential": lambda: K.AugmentationSequential(
        K.ColorJiggle(0.3, 0.3, 0.3, 0.3, p=0.8), K.RandomBoxBlur((3, 3), p=0.5), data_keys=["input"]
    ),
}


def noise(images: Tensor) -> Tensor:
    return (images + 0.1 * torch.rand_like(images)).clamp(0, 1)


def data(n: int = 3, size: tuple[int, int] = (8, 10)) -> tuple[Tensor, Tensor, Tensor]:
    source, target = torch.rand(2, n, 3, *size, generator=seeded(0))
    return source, torch.randint(0, C, (n, *size), generator=seeded(1)), target


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", AUGMENTS)
@pytest.mark.parametrize("recipe", ["released", "mic"])
def test_step__is_replayed_by_draw_and_generator_and_split_over_ranks(name: str, recipe: str) -> None:
    training = recipes.self_training(
        small_network(C), C, recipe=recipe, augment=SeededAugment(AUGMENTS[name]())
    ).train()
    source, labels, target = data()
    draw = training.sample(3, (8, 10), generator=seeded(2))
    torch.manual_seed(0)
    first = training(source, labels, target, draw=draw)
    torch.manual_seed(1)
    second = training(source, labels, target, draw=draw)
    assert torch.equal(first.mixed.images, second.mixed.images)
    assert torch.equal(first.loss, second.loss)
    plain = recipes.self_training(training.student, C, recipe=recipe, augment=None).train()
    if name not in {"grey", "blur", "posterize"}:  # which may leave an image alone
        assert not torch.equal(first.mixed.images, plain(source, labels, target, draw=draw).mixed.images)
    for rows in (slice(0, 1), slice(1, 3)):
        part = training(source[rows], labels[rows], target[rows], draw=draw.rows(rows))
        assert torch.equal(part.mixed.images, first.mixed.images[rows])
    seeds = [training(source, labels, target, generator=seeded(7)).mixed.images for _ in range(2)]
    assert torch.equal(*seeds)


def test_forward__restores_the_global_generator_and_draws_from_it_without_a_draw() -> None:
    augment, images = SeededAugment(noise), torch.rand(2, 3, 4, 4)
    draw = augment.sample(2, generator=seeded(0))
    before = torch.get_rng_state()
    augment(images, draw=draw)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    once, again = augment(images), augment(images)
    assert not torch.equal(once, again)
    torch.manual_seed(3)
    assert torch.equal(augment(images), once)


@pytest.mark.gpu
def test_forward__replays_what_is_drawn_on_a_gpu() -> None:
    augment, images = SeededAugment(noise), torch.rand(2, 3, 4, 4, device="cuda")
    draw = augment.sample(2, generator=seeded(0), device="cuda")
    before = torch.cuda.get_rng_state()
    first = augment(images, draw=draw)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    torch.rand(5, device="cuda")
    assert torch.equal(augment(images, draw=draw), first)


def test_forward__batches_are_their_images_and_none_is_no_error() -> None:
    augment, images = SeededAugment(noise), torch.rand(3, 3, 4, 5)
    draw = augment.sample(3, generator=seeded(0))
    whole = augment(images, draw=draw)
    assert torch.equal(whole[1:2], augment(images[1:2], draw=draw[1:2]))
    assert augment(images[:0]).shape == (0, 3, 4, 5)
    assert draw.dtype == torch.int64


def test_module__copies_and_shows_what_it_holds() -> None:
    augment = SeededAugment(K.RandomGrayscale(p=0.5))
    assert "RandomGrayscale" in repr(augment)
    assert "noise" in repr(SeededAugment(noise))
    images, draw = torch.rand(4, 3, 4, 4), augment.sample(4)
    for other in (copy.deepcopy(augment), pickle.loads(pickle.dumps(augment))):
        assert torch.equal(other(images, draw=draw), augment(images, draw=draw))


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "`augment` must be callable", lambda: SeededAugment(3)),  # type: ignore[arg-type]
        (TypeError, "`augment` must be callable", lambda: SeededAugment(StrongAugment)),
        (ValueError, r"`draw` must have shape \(N,\) = \(2,\), got \(3,\)",
         lambda: SeededAugment(noise)(torch.rand(2, 3, 4, 4), draw=torch.arange(3))),
        (TypeError, "`draw` must be a torch.Tensor", lambda: SeededAugment(noise)(torch.rand(2, 3, 4, 4), draw=[1, 2])),
        (ValueError, "`images` must have shape", lambda: SeededAugment(noise)(torch.rand(3, 4, 4))),
    ],
    ids=["number", "class", "draw of another size", "list", "one image"],
)  # fmt: skip
def test_refused(error: type[Exception], match: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=match):
        call()


def test_draw__of_a_step_must_be_whole() -> None:
    network = small_network(C)
    training = SelfTraining(network, MeanTeacher(network), mix=CrossDomainMix(C), augment=SeededAugment(noise))
    source, labels, target = data()
    with pytest.raises(ValueError, match=r"`draw.augment` must be given"):
        training(source, labels, target, draw=training.sample(3)._replace(augment=None))


def test_augment__that_moves_the_shape_or_the_range_is_still_refused() -> None:
    network = small_network(C)
    source, labels, target = data()
    for augment, match in (
        (lambda x: x[..., ::2], "must keep the shape"),
        (lambda x: x * 255, r"must lie in \[0, 1\]"),
    ):
        training = SelfTraining(network, MeanTeacher(network), mix=CrossDomainMix(C), augment=SeededAugment(augment))
        with pytest.raises(ValueError, match=match):
            training(source, labels, target)


def test_own_augmentation__with_a_draw_of_its_own() -> None:
    """`DrawnAugment`: whatever has `sample` and takes a `draw` is given what it sampled."""

    class Darker(nn.Module):
        def sample(self, n: int, *, generator: torch.Generator | None = None, device: object = None) -> Tensor:  # noqa: ARG002
            return torch.rand(n, generator=generator)

        def forward(self, images: Tensor, *, draw: Tensor) -> Tensor:
            return images * draw[:, None, None, None]

    network, (source, labels, target) = small_network(C), data()
    training = SelfTraining(network, MeanTeacher(network), mix=CrossDomainMix(C), augment=Darker())
    draw = training.sample(3, generator=seeded(0))
    got = training(source, labels, target, draw=draw).mixed
    plain = SelfTraining(network, training.teacher, mix=training.mix)
    want = plain(source, labels, target, draw=draw).mixed.images * draw.augment[:, None, None, None]
    torch.testing.assert_close(got.images, want)
    pair = draw._replace(augment=(draw.augment, draw.augment))
    assert [len(part) for part in pair.rows(slice(2)).augment] == [2, 2]


def test_own_augmentation__with_another_sample_is_any_callable() -> None:
    class Plain(nn.Module):
        def sample(self) -> float:
            raise AssertionError

        def forward(self, images: Tensor) -> Tensor:
            return images / 2

    network, (source, labels, target) = small_network(C), data()
    training = SelfTraining(network, MeanTeacher(network), mix=CrossDomainMix(C), augment=Plain())
    draw = training.sample(3)
    assert draw.augment is None
    got = training(source, labels, target, draw=draw).mixed.images
    training.augment = None
    torch.testing.assert_close(got, training(source, labels, target, draw=draw).mixed.images / 2)


@pytest.mark.filterwarnings("ignore")
def test_torchvision__transforms_are_replayed() -> None:
    needed("torchvision")
    from torchvision.transforms import v2

    augment = SeededAugment(v2.Compose([v2.ColorJitter(0.3, 0.3, 0.3, 0.2), v2.GaussianBlur(3, (0.1, 1.0))]))
    images, draw = torch.rand(3, 3, 8, 8), augment.sample(3)
    assert torch.equal(augment(images, draw=draw), augment(images, draw=draw))
    assert not torch.equal(augment(images, draw=draw), augment(images))
