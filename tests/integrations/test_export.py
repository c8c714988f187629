"""The network, exported."""

from pathlib import Path

import pytest
import torch

from checks import needed
from crossmix import recipes
from crossmix.models import deeplab_v2_tiny
from oracles import seeded

pytestmark = pytest.mark.filterwarnings("ignore")
DYNAMIC = torch.export.Dim.DYNAMIC


def test_export__of_student_and_teacher_at_any_size() -> None:
    training = recipes.self_training(deeplab_v2_tiny(5), 5)
    images, other = torch.rand(2, 3, 64, 64, generator=seeded(0)), torch.rand(1, 3, 40, 72, generator=seeded(1))
    for network in (training.student.eval(), training.teacher.module):
        program = torch.export.export(network, (images,), dynamic_shapes=({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},))
        torch.testing.assert_close(program.module()(other), network(other))


def test_trace__works_where_script_does_not() -> None:
    network, images = deeplab_v2_tiny(5).eval(), torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(torch.jit.trace(network, images)(images), network(images))
    with pytest.raises(RuntimeError):  # as docs/frameworks/export.md says
        torch.jit.script(network)


def test_onnx__computes_the_same(tmp_path: Path) -> None:
    needed("onnxscript")
    reference = needed("onnx.reference")
    network, images = deeplab_v2_tiny(5).eval(), torch.rand(1, 3, 32, 48, generator=seeded(0))
    torch.onnx.export(network, (images,), tmp_path / "network.onnx", dynamo=True, verbose=False)
    got = reference.ReferenceEvaluator(str(tmp_path / "network.onnx")).run(None, {"images": images.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), network(images).detach(), rtol=1e-3, atol=1e-4)
