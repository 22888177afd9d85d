"""RobustClassifier: a step in one forward, over models of several makes."""

import copy
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from robustfast import DiscriminativeLoss, RobustClassifier
from robustfast.functional import noisy_pair
from robustfast.training import models

NOISE = {"sigma": 0.2, "mean": [0.4, 0.5, 0.6], "pixel_std": [0.2, 0.3, 0.25]}
LABELS = torch.tensor([0, 1, 1, 2, 0])
IDS = torch.tensor([7, 3, 100, 0, 5])


class Named(nn.Module):
    """A model in torchvision's manner: the classifier is a layer somewhere inside."""

    def __init__(self, timm_style):
        super().__init__()
        self.body = timm_style.backbone
        self.classifier = nn.Sequential(timm_style.penultimate, nn.Sequential(timm_style.fc))

    def forward(self, images):
        return self.classifier(self.body(images))


@pytest.fixture
def images():
    return torch.randint(256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def build(kind="timm", loss=True, **settings):
    model = models.build("small", channels=3, inter_dim=6, num_classes=4, seed=2)
    loss = DiscriminativeLoss(4, 6, delta_var=0.1) if loss is True else loss
    if kind == "timm":
        return RobustClassifier(model, loss, **NOISE, **settings)
    named = Named(model)
    classifier = "classifier.1.0" if kind == "name" else named.classifier[1][0]
    return RobustClassifier(named, loss, classifier=classifier, **NOISE, **settings)


def by_hand(images, cross_entropy="clean", weight=1.0):
    model = models.build("small", channels=3, inter_dim=6, num_classes=4, seed=2)
    loss_fn = DiscriminativeLoss(4, 6, delta_var=0.1)
    views = noisy_pair(images, 0.2, mean=NOISE["mean"], pixel_std=NOISE["pixel_std"], seed=9, sample_ids=IDS, draw=4)
    f, g = (model.features(view) for view in views)
    entropies = {"clean": F.cross_entropy(model.fc(f), LABELS), "noisy": F.cross_entropy(model.fc(g), LABELS)}
    entropies["both"] = (entropies["clean"] + entropies["noisy"]) / 2
    robustness = loss_fn(f, g, LABELS, model.fc)
    total = entropies[cross_entropy] + weight * robustness
    return total, list(torch.autograd.grad(total, list(model.parameters()))), loss_fn, robustness


@pytest.mark.parametrize("kind", ["timm", "name", "layer"])
@pytest.mark.parametrize("cross_entropy", ["clean", "noisy", "both"])
@pytest.mark.parametrize("concatenate", [False, True])
def test_a_step_is_the_same_by_hand(images, kind, cross_entropy, concatenate):
    module = build(kind, cross_entropy=cross_entropy, loss_weight=0.7, seed=9, concatenate=concatenate)
    out = module(images, LABELS, sample_ids=IDS, draw=4)
    out["loss"].backward()
    total, grads, loss_fn, robustness = by_hand(images, cross_entropy, 0.7)
    torch.testing.assert_close(out["loss"], total)
    torch.testing.assert_close([parameter.grad for parameter in module.parameters()], grads, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(module.loss.state_dict(), loss_fn.state_dict())
    torch.testing.assert_close(out["terms"]["loss"], robustness.detach())
    assert not any(term.requires_grad for term in out["terms"].values())
    assert out["logits"].shape == (5, 4)
    if cross_entropy != "noisy":
        torch.testing.assert_close(out["logits"], module(images))


def test_terms_of_the_loss_are_passed_on(images):
    out = build(loss=DiscriminativeLoss(4, 6, return_terms=True))(images, LABELS)
    assert out["terms"].keys() >= {"cross_entropy", "loss", "variance", "margin", "regularization", "alignment"}
    assert out["loss"].requires_grad and not out["terms"]["loss"].requires_grad


@pytest.mark.parametrize(("cross_entropy", "passes"), [("clean", 1), ("noisy", 1), ("both", 2)])
def test_a_view_that_nothing_needs_is_not_run(images, cross_entropy, passes):
    module = build(loss=None, cross_entropy=cross_entropy, seed=9)
    calls = []
    module.model.backbone.register_forward_hook(lambda *arguments: calls.append(1))
    out = module(images, LABELS)
    assert len(calls) == passes and out["terms"].keys() == {"cross_entropy"}


def test_logits_are_those_of_normalised_images(images):
    module = build()
    mean, pixel_std = (torch.tensor(NOISE[name]).view(3, 1, 1) for name in ("mean", "pixel_std"))
    expected = module.model((images / 255 - mean) / pixel_std)
    torch.testing.assert_close(module(images), expected)
    torch.testing.assert_close(module(images / 255), expected)


def test_noise_without_a_seed_is_the_generators(images):
    module = build(loss=None, cross_entropy="noisy")
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(module(images, LABELS)["loss"].item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("kind", ["timm", "name"])
def test_state_and_copies(images, kind):
    module = build(kind, seed=9)
    module(images, LABELS)
    names = module.state_dict().keys()
    assert {"loss.centroids", "loss.seen"} < names and all(name.startswith(("model.", "loss.")) for name in names)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            other.classifier.weight.zero_()
            other.classifier.bias.zero_()
        assert other(images, LABELS)["logits"].eq(0).all() and not module(images).eq(0).all()


@pytest.mark.parametrize("kind", ["timm", "name"])
def test_one_graph(images, kind):
    module = build(kind, seed=9)
    compiled = torch.compile(build(kind, seed=9), fullgraph=True, backend="aot_eager")
    for draw in (0, 1):
        torch.testing.assert_close(
            compiled(images, LABELS, IDS, draw)["loss"], module(images, LABELS, IDS, draw)["loss"]
        )
    torch.testing.assert_close(compiled._orig_mod.state_dict(), module.state_dict())


def test_batches_of_any_size_take_two_compilations():
    """PyTorch's convolutions on the CPU compile anew at 16 images; this model has none."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Linear(6, 4))
    step = RobustClassifier(model, DiscriminativeLoss(4, 6), classifier="2", seed=9, **NOISE)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(step), fullgraph=True, backend=counter)
    for n in (5, 7, 2, 64, 33):
        images = torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8)
        labels, ids = torch.arange(n) % 4, torch.arange(n)
        found = compiled(images, labels, ids)["loss"]
        found.backward()
        torch.testing.assert_close(found, step(images, labels, ids)["loss"])
    assert counter.frame_count <= 2


@pytest.mark.parametrize("cross_entropy", ["clean", "both"])
def test_label_smoothing(images, cross_entropy):
    module = build(loss=None, cross_entropy=cross_entropy, label_smoothing=0.2, seed=9)
    views = noisy_pair(images, 0.2, mean=NOISE["mean"], pixel_std=NOISE["pixel_std"], seed=9, sample_ids=IDS, draw=4)
    entropies = [F.cross_entropy(module.model(view), LABELS, label_smoothing=0.2) for view in views]
    expected = entropies[0] if cross_entropy == "clean" else sum(entropies) / 2
    torch.testing.assert_close(module(images, LABELS, IDS, 4)["loss"], expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16])
def test_label_dtypes(images, dtype):
    expected = build(seed=9)(images, LABELS)["terms"]
    torch.testing.assert_close(build(seed=9)(images, LABELS.to(dtype))["terms"], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (LABELS.tolist(), TypeError, "labels: expected a tensor, got list"),
        (LABELS.float(), TypeError, r"labels: expected torch\.int64 or .*, got torch\.float32"),
        (LABELS > 0, TypeError, r"labels: expected torch\.int64 or .*, got torch\.bool"),
        (LABELS.unsqueeze(1), ValueError, r"labels: expected shape \(N,\), got \(5, 1\)"),
    ],
)
def test_what_are_no_labels_is_named(images, labels, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        build()(images, labels)


def test_probabilities_for_cross_entropy_alone(images):
    step, soft = build(loss=None, seed=9), F.one_hot(LABELS, 4).float()
    torch.testing.assert_close(step(images, soft)["loss"], step(images, LABELS)["loss"])


def ddp_step(rank, begin):
    """One step of one rank's half of the batch under DistributedDataParallel, and afterwards plain logits."""
    begin()
    step = build(seed=9, loss=DiscriminativeLoss(4, 6, process_group="world"))
    ddp = DistributedDataParallel(step)
    images, labels, ids = global_batch()
    mine = slice(4 * rank, 4 * rank + 4)
    for draw in (0, 1):
        ddp.zero_grad()
        ddp(images[mine], labels[mine], ids[mine], draw)["loss"].backward()
    return [parameter.grad for parameter in step.parameters()], dict(step.loss.state_dict())


def global_batch():
    images = torch.randint(256, (8, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return images, torch.tensor([0, 1, 1, 3, 0, 0, 1, 2]), torch.arange(8) * 5


def test_two_ranks_take_the_step_of_one_process(tmp_path):
    step = build(seed=9, loss=DiscriminativeLoss(4, 6))
    images, labels, ids = global_batch()
    for draw in (0, 1):
        step.zero_grad()
        step(images, labels, ids, draw)["loss"].backward()
    expected = [parameter.grad for parameter in step.parameters()]
    for grads, state in run_ranks(ddp_step, tmp_path / "store"):
        torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state, dict(step.loss.state_dict()))


@pytest.mark.parametrize(
    ("library", "name", "classifier", "dim"),
    [
        ("timm", "resnet18", None, 512),
        ("timm", "mobilenetv3_small_050", None, 1024),
        ("timm", "convnext_atto", None, 320),
        ("torchvision", "resnet18", "fc", 512),
        ("torchvision", "mobilenet_v3_small", "classifier.3", 1024),
    ],
)
def test_models_of_libraries(library, name, classifier, dim):
    package = pytest.importorskip("timm" if library == "timm" else "torchvision.models")
    model = package.create_model(name, num_classes=4) if library == "timm" else getattr(package, name)(num_classes=4)
    step = RobustClassifier(model.eval(), DiscriminativeLoss(4, dim), classifier=classifier, **NOISE)
    images = torch.randint(256, (5, 3, 64, 64), dtype=torch.uint8)
    out = step(images, LABELS)
    out["loss"].backward()
    torch.testing.assert_close(out["logits"], step(images), rtol=1e-3, atol=1e-4)
    assert step.classifier.weight.grad.isfinite().all() and step.classifier.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["timm", "name"])
def test_in_another_dtype(images, kind, dtype):
    """A module that was converted makes its views in its dtype, of images of any."""
    plain, step = (build(kind, seed=9).eval() for _ in range(2))
    step.to(dtype)
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float64 else 0.05}
    for given in (images, images / 255, (images / 255).to(dtype)):
        torch.testing.assert_close(step(given).to(torch.float32), plain(images), **tolerance)
        torch.testing.assert_close(
            step(given, LABELS)["logits"].to(torch.float32), plain(images, LABELS)["logits"], **tolerance
        )
    step.train()(images, LABELS)["loss"].backward()
    assert step.classifier.weight.grad.dtype == dtype


def replica_of(module):
    """As DataParallel's replicate makes them: shallow copies, part by part, which share hooks with the original."""
    twin = module._replicate_for_data_parallel()
    twin._parameters = dict(module._parameters)
    for name, part in module._modules.items():
        setattr(twin, name, replica_of(part))
    return twin


def test_replicas_of_data_parallel(images):
    step = build("name", seed=9)
    expected = copy.deepcopy(step)(images, LABELS)["loss"]
    assert torch.equal(replica_of(step)(images, LABELS)["loss"], expected)


def test_threads_do_not_meet():
    """As a server's: each has the features of its own batch, though both have called the classifier before."""
    step, both = build("name").eval(), threading.Barrier(2)
    step.model.register_forward_hook(lambda *_: both.wait() < 0 or None)
    with ThreadPoolExecutor(2) as pool:
        for features, logits in pool.map(step._pass, (torch.rand(5, 3, 8, 8), torch.rand(3, 3, 8, 8))):
            torch.testing.assert_close(step.classifier(features), logits)


def test_features_that_nobody_asks_for_are_not_kept(images):
    """Logits alone, as of an evaluation: features would stay, and their graph, until the next step."""
    step, kept = build("name"), []
    step.classifier.register_forward_pre_hook(lambda _, given: kept.append(weakref.ref(given[0])))
    step(images)
    assert len(kept) == 1 and kept[0]() is None


def test_a_model_that_fails_leaves_nothing_behind(images):
    module = build("layer")
    forward, features = module.model.forward, []
    module.classifier.register_forward_pre_hook(lambda _, arguments: features.append(weakref.ref(arguments[0])))

    def fail(images):
        forward(images)
        raise RuntimeError("out of memory")

    module.model.forward = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        module(images, LABELS)
    with pytest.raises(RuntimeError, match="out of memory"):
        module.model(images.float())  # no step: its features are nobody's
    assert [feature() for feature in features] == [None, None]


def test_mistakes_are_named():
    model = Named(models.build("small", channels=3, inter_dim=6, num_classes=4, seed=2))
    with pytest.raises(ValueError, match=r"^classifier: name the layer .* one of classifier\.0, classifier\.1\.0$"):
        RobustClassifier(model, None, **NOISE)
    with pytest.raises(ValueError, match=r"^classifier: not in the model: 'fc'"):
        RobustClassifier(model, None, classifier="fc", **NOISE)
    with pytest.raises(ValueError, match=r"^classifier: not in the model: Linear"):
        RobustClassifier(model, None, classifier=nn.Linear(6, 4), **NOISE)
    with pytest.raises(ValueError, match=r"^classifier: classifier\.1 has no weight"):
        RobustClassifier(model, None, classifier="classifier.1", **NOISE)
    with pytest.raises(ValueError, match=r"^cross_entropy: expected one of clean, noisy, both, got 'none'"):
        RobustClassifier(model, None, classifier="classifier.1.0", cross_entropy="none", **NOISE)
    model.forward = lambda images: images.flatten(1)[:, :4]
    with pytest.raises(ValueError, match=r"^classifier: the model's forward does not call its classifier\.1\.0"):
        RobustClassifier(model, None, classifier="classifier.1.0", **NOISE)(torch.rand(5, 3, 8, 8), LABELS)
