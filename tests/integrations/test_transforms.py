"""Types and layouts of torchvision's and albumentations' images."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from checks import needed
from crossmix import ClassMix, CrossDomainMix, recipes
from crossmix.evaluation import evaluate
from oracles import seeded

C = 5


def data(n: int = 3) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, 8, 10, generator=seeded(0)), torch.randint(0, C, (n, 8, 10), generator=seeded(1))


def scores(n: int = 3) -> Tensor:
    return torch.rand(n, C + 1, generator=seeded(2))


class Typed(Tensor):
    """As torchvision's TVTensor: operations return plain tensors."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN206
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Image(Typed):
    pass


class Mask(Typed):
    pass


def test_types__are_kept_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `tv_tensors`, which not every environment has."""
    stub = SimpleNamespace(TVTensor=Typed, wrap=lambda part, like: part.as_subclass(type(like)))
    monkeypatch.setitem(sys.modules, "torchvision.tv_tensors", stub)
    images, labels = data()
    plain = ClassMix(C)(images, labels, scores=scores())
    assert [type(part) for part in plain] == [Tensor] * 4
    typed = ClassMix(C)(images.as_subclass(Image), labels.as_subclass(Mask), scores=scores())
    assert [type(part) for part in typed] == [Image, Mask, Mask, Mask]
    half = ClassMix(C)(images.as_subclass(Image), labels, scores=scores())
    assert [type(part) for part in half] == [Image, Tensor, Tensor, Tensor]
    pasted = CrossDomainMix(C)(images.as_subclass(Image), labels.as_subclass(Mask), images, labels, scores=scores())
    assert [type(part) for part in pasted] == [Image, Mask, Mask, Mask]
    for mixed in (typed, half):
        for part, want in zip(mixed, plain, strict=True):
            assert torch.equal(part.as_subclass(Tensor), want)


@pytest.mark.filterwarnings("ignore")
def test_compose__moves_images_labels_weights_and_mask_alike() -> None:
    v2 = needed("torchvision.transforms.v2")
    tv = needed("torchvision.tv_tensors")
    images, labels = data()
    torch.manual_seed(0)
    plain = ClassMix(C)(images, labels)
    torch.manual_seed(0)
    transform = v2.Compose([ClassMix(C), v2.RandomHorizontalFlip(p=1.0)])
    flipped = transform(tv.Image(images), tv.Mask(labels))
    for got, want in zip(flipped, plain, strict=True):
        assert torch.equal(torch.as_tensor(got), want.flip(-1))
    moved = v2.Compose([ClassMix(C), v2.RandomResizedCrop((4, 4)), v2.RandomRotation(30)])(
        tv.Image(images), tv.Mask(labels)
    )
    assert [tuple(part.shape[-2:]) for part in moved] == [(4, 4)] * 4
    assert moved[1].dtype == labels.dtype


@pytest.mark.filterwarnings("ignore")
def test_step__of_typed_images_is_that_of_plain_ones() -> None:
    tv = needed("torchvision.tv_tensors")
    torch.manual_seed(0)
    training = recipes.self_training(nn.Conv2d(3, C, 1), C).train()
    images, labels = data()
    draw = training.sample(3, (8, 10))
    plain = training(images, labels, images.flip(0), draw=draw)
    typed = training(tv.Image(images), tv.Mask(labels), tv.Image(images.flip(0)), draw=draw)
    assert torch.equal(typed.loss, plain.loss)
    assert torch.equal(torch.as_tensor(typed.mixed.labels), plain.mixed.labels)


def test_channels_last__are_refused_with_what_to_do() -> None:
    images, labels = data()
    training = recipes.self_training(nn.Conv2d(3, C, 1), C)
    with pytest.raises(ValueError, match=r"move channels that are last with `.permute\(0, 3, 1, 2\)`"):
        training(images.movedim(1, -1), labels, images.movedim(1, -1))
    with pytest.raises(ValueError, match=r"move the channels to the front, with `.movedim\(-1, -3\)`"):
        evaluate(nn.Conv2d(3, C, 1), [(images[0].movedim(0, -1), labels[0])], num_classes=C)
    narrow = torch.rand(1, 3, 3, 3), torch.zeros(1, 3, 3, dtype=torch.long)  # nothing tells where the channels are
    evaluate(nn.Conv2d(3, C, 1), [narrow], num_classes=C)


@pytest.mark.filterwarnings("ignore")
def test_albumentations__uint8_pictures_reach_the_step() -> None:
    albumentations = needed("albumentations")
    to_tensor = needed("albumentations.pytorch").ToTensorV2()
    pipeline = albumentations.Compose(
        [
            albumentations.HorizontalFlip(p=1.0),
            albumentations.PadIfNeeded(12, 12, fill=0, fill_mask=255, position="top_left"),
            to_tensor,
        ]
    )
    picture = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    label = np.random.default_rng(1).integers(0, C, (8, 10), dtype=np.uint8)
    out = pipeline(image=picture, mask=label)
    assert torch.equal(out["image"][:, :8, :10], torch.from_numpy(picture[:, ::-1].copy()).movedim(-1, 0))
    assert (out["mask"][8:] == 255).all()
    images, labels = out["image"][None] / 255, out["mask"][None]
    output = recipes.self_training(nn.Conv2d(3, C, 1), C)(images, labels, images)
    assert output.loss.isfinite()
    matrix = evaluate(nn.Conv2d(3, C, 1), [(out["image"], out["mask"])], num_classes=C)["native"]
    assert int(matrix.counts.sum()) == 80
