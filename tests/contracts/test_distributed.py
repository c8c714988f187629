"""Two processes with half of a batch each do what one process does with all of it."""

from pathlib import Path

import pytest
import torch

from crossmix import _distributed
from runs import run_ranks

SCRIPT = """
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from crossmix import ConfidenceWeightedCE, CrossDomainMix, DistributionAlignment, MaskedImages, MeanTeacher
    from crossmix import SelfTraining
    from crossmix.diagnostics import PseudoLabelMonitor, UnsupervisedScores
    from crossmix.functional import pseudo_label_from_probs
    from crossmix.metrics import ConfusionMatrix

    dtype, tolerance = torch.float64, 1e-12
    g = torch.Generator().manual_seed(0)
    source, target = torch.rand(2, 4, 3, 6, 8, generator=g, dtype=dtype)
    labels = torch.randint(0, 3, (4, 6, 8), generator=g)
    labels[0] = 255  # the ranks see very different numbers of valid pixels
    labels[1, :3] = 255

    def build(sync):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1)).to(dtype)
        with torch.no_grad():
            network[2].weight.mul_(8)
        return network

    def training(student, teacher, normalizer, sync):
        return SelfTraining(
            student, teacher, mix=CrossDomainMix(3),
            criterion=ConfidenceWeightedCE(0.5, scope="batch", normalizer=normalizer, sync=sync),
            source_criterion=ConfidenceWeightedCE(normalizer="valid", sync=sync),
            consistency=MaskedImages(2), ignore_bottom=120,
        )

    rows = slice(2 * rank, 2 * rank + 2)
    for normalizer in ("all", "valid", "weights"):
        whole, part = build(False), build(True)
        one = training(whole, MeanTeacher(whole), normalizer, sync=False)
        wrapped = DistributedDataParallel(part)
        two = training(wrapped, MeanTeacher(wrapped), normalizer, sync=True)
        optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (whole, part)]
        for step in range(8):
            draw = one.sample(4, (6, 8), generator=torch.Generator().manual_seed(step))
            a = one(source, labels, target, draw=draw)
            b = two(source[rows], labels[rows], target[rows], draw=draw.rows(rows))
            assert a.consistency_loss > 0
            torch.testing.assert_close(b.mixed.weights, a.mixed.weights[rows], rtol=tolerance, atol=0)
            for optimizer, output, owner in zip(optimizers, (a, b), (one, two)):
                optimizer.zero_grad()
                output.loss.backward()
                optimizer.step()
                owner.update()
        for p, q in zip(whole.parameters(), part.parameters()):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        for p, q in zip(one.teacher.module.parameters(), two.teacher.module.parameters()):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)

    small = torch.randn(4, 3, 2, 3, generator=g, dtype=torch.float64)
    weights = torch.rand(4, 6, 8, generator=g, dtype=torch.float64)
    soft = torch.rand(4, 3, 6, 8, generator=g, dtype=torch.float64).softmax(1)
    for normalizer in ("all", "valid", "weights"):
        for truth, more in ((labels, {}), (labels, {"class_weights": [1, 0, 3]}), (soft, {"label_smoothing": 0.1})):
            options = {"normalizer": normalizer, **more}
            everything, mine = small.clone().requires_grad_(), small[rows].clone().requires_grad_()
            ConfidenceWeightedCE(**options).upsampled(everything, truth, weights).backward()
            ConfidenceWeightedCE(**options, sync=True).upsampled(mine, truth[rows], weights[rows]).backward()
            torch.testing.assert_close(mine.grad / 2, everything.grad[rows], rtol=1e-10, atol=1e-14)

    probs = torch.rand(4, 3, 6, 8, generator=g).softmax(1)
    whole, part = DistributionAlignment(3), DistributionAlignment(3, sync=True)
    alone = DistributionAlignment(3)
    whole.update(probs), part.update(probs[rows]), alone.update(probs[rows])
    whole.update_prior(labels), part.update_prior(labels[rows])
    torch.testing.assert_close(part.running, whole.running)
    torch.testing.assert_close(part.prior, whole.prior)
    assert not torch.allclose(alone.running, whole.running, rtol=1e-5)  # nothing communicates unless asked to

    predictions = torch.randint(0, 3, (4, 6, 8), generator=g)
    whole, part = ConfusionMatrix(3), ConfusionMatrix(3)
    whole.update(predictions, labels), part.update(predictions[rows], labels[rows])
    for _ in range(2):  # idempotent
        part.merge()
        torch.testing.assert_close(part.compute().per_class, whole.compute().per_class)
    part.update(predictions[rows], labels[rows])
    part.merge()
    whole.update(predictions, labels)
    assert part.compute().pixel_accuracy == whole.compute().pixel_accuracy
    part.invalid.add_(1 - rank)  # what a GPU of rank 0 leaves of a prediction that is no class
    for _ in range(2):
        part.merge()
        try:
            part.compute()
        except ValueError as error:  # on every rank
            assert "must lie in 0..2" in str(error)
        else:
            raise AssertionError(f"rank {rank} was not told")

    pseudo, confidence = pseudo_label_from_probs(probs)
    whole, part, alone = (PseudoLabelMonitor(3, threshold=0.4) for _ in range(3))
    for _ in range(2):
        whole.update(pseudo, confidence, truth=labels, student=predictions)
        for monitor in (part, alone):
            monitor.update(pseudo[rows], confidence[rows], truth=labels[rows], student=predictions[rows])
        for _ in range(2):  # idempotent
            part.merge()
            assert part.compute().as_dict() == whole.compute().as_dict()
    assert 0 < alone.compute().pixels < part.compute().pixels

    scores = [UnsupervisedScores(3, pixels=20) for _ in range(4)]  # of each rank's batch, of all, and merged
    for r, batch in enumerate(probs.log().chunk(2)):
        scores[r].update(batch)
        scores[2].update(batch)
        if r == rank:
            scores[3].update(batch)
    for _ in range(2):
        scores[3].merge()
        assert scores[3].compute() == scores[2].compute()
    assert scores[0].compute() != scores[2].compute()
"""


SHARDED = """
    from torch import nn
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from crossmix import MeanTeacher

    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(rank))

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()), nn.Conv2d(5, 3, 1))

    def shard(network, **options):
        fully_shard(network[0], **options)
        return fully_shard(network, **options)

    def ddp():
        network = build()
        return MeanTeacher(network), DistributedDataParallel(network)

    def both_sharded_afterwards():
        network = build()
        teacher = MeanTeacher(network)
        shard(teacher.module)
        return teacher, shard(network)

    def student_sharded_afterwards():
        network = build()
        teacher = MeanTeacher(network)
        return teacher, shard(network)

    def sharded_first(second):
        network = shard(build())
        try:
            MeanTeacher(network)
        except ValueError as error:
            assert "make the teacher first" in str(error)
            assert "network=" in str(error)
        else:
            raise AssertionError("fully_shard has learnt to be copied")
        return MeanTeacher(network, network=second()), network

    def whole_first_and_sharded_then():
        teacher, network = sharded_first(build)
        shard(teacher.module)
        return teacher, network

    def train(make):
        teacher, network = make()
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        outputs = []
        for _ in range(4):
            outputs.append(teacher(images))
            network(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                network(images)  # after which its root holds whole tensors
            teacher.update(network)
        whole = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
            for name, value in teacher.module.named_parameters()
        }
        return whole, torch.stack(outputs), teacher.num_updates

    want = train(ddp)
    for make in (
        both_sharded_afterwards,
        student_sharded_afterwards,
        lambda: sharded_first(build),
        lambda: sharded_first(lambda: shard(build())),
        whole_first_and_sharded_then,
    ):
        torch.testing.assert_close(train(make), want, rtol=1e-6, atol=1e-7)

    network = shard(build().bfloat16())
    teacher = MeanTeacher(network, network=shard(build(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)))
    teacher.update(network)
    assert teacher(images.bfloat16()).dtype == torch.bfloat16
    teacher.update(network)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
"""


@pytest.mark.slow
def test_sharded_students_give_the_teacher_that_ddp_gives(tmp_path: Path) -> None:
    run_ranks(SHARDED, 2, tmp_path)


@pytest.mark.slow
def test_two_ranks_equal_one_after_several_steps(tmp_path: Path) -> None:
    run_ranks(SCRIPT, 2, tmp_path)


@pytest.mark.usefixtures("process_group")
def test_all_reduce_sum__is_a_new_tensor_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.arange(3.0, requires_grad=True)
    for size in (1, 2):  # as if there were another rank, which the group of this process does not know
        monkeypatch.setattr(_distributed, "world_size", lambda size=size: size)
        total = _distributed.all_reduce_sum(value)
        assert not total.requires_grad
        assert torch.equal(total, value)
        assert total.data_ptr() != value.data_ptr()
