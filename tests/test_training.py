"""Recipes, models, presets, the loop and the accuracy it reports; its files are in test_runs.py."""

import json
import math
import re
import sys
from dataclasses import fields, replace
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import robustfast
from robustfast.evaluation import accuracy, noise, noise_curve
from robustfast.streams import stream
from robustfast.training import Config, batching, data, files, load_classifier, loop, models, preset, recipes, train
from robustfast.training.config import METHODS, from_json
from robustfast.training.run import Run
from robustfast.training.setup import prepare

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("one_thread")


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return models.build("small", channels=1, inter_dim=5, num_classes=4, seed=1)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(6, 1, 8, 8, generator=generator)
    return batching.Batch(
        clean, clean + torch.randn(clean.shape, generator=generator), torch.tensor([0, 2, 2, 3, 0, 2])
    )


def recipe_of(config, model):
    return recipes.build(config, model, {"mean": [0.0], "pixel_std": [1.0]})


def objective(recipe, batch):
    return recipe((batch.clean, batch.noisy), batch.target)["loss"]


def cross_entropy(model, images, target):
    logits = model(images).detach().double()
    return float((logits.logsumexp(1) - logits[torch.arange(len(target)), target]).mean())


@pytest.mark.parametrize(("method", "views"), [("normal", [0]), ("noisy", [1]), ("both", [0, 1])])
def test_cross_entropy_recipes(model, batch, method, views):
    expected = np.mean([cross_entropy(model, batch[view], batch.target) for view in views])
    assert objective(recipe_of(Config(method), model), batch).item() == pytest.approx(expected, rel=1e-6)


def test_stability_recipe(model, batch):
    clean, noisy = (model.features(view).detach().double() for view in batch[:2])
    expected = cross_entropy(model, batch.clean, batch.target) + 0.3 * (clean - noisy).square().sum(1).sqrt().mean()
    recipe = recipe_of(Config("stability", loss_weight=0.3), model)
    assert objective(recipe, batch).item() == pytest.approx(float(expected), rel=1e-6)


def test_stability_without_noise_has_the_gradient_of_cross_entropy(model, batch):
    recipe, same = recipe_of(Config("stability"), model), batch._replace(noisy=batch.clean)
    grads = torch.autograd.grad(objective(recipe, same), list(model.parameters()))
    expected = torch.autograd.grad(F.cross_entropy(model(batch.clean), batch.target), list(model.parameters()))
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize(
    ("method", "settings", "pulls"),
    [
        ("discriminative", {}, ("clean", "clean")),
        ("discriminative-both", {"noisy_share": 0.3}, ("clean", "clean")),
        ("discriminative-both", {"noisy_share": 0.0, "alignment": "own"}, ("clean", "own")),
        ("discriminative", {"alignment": "none"}, ("clean", None)),
    ],
)
def test_discriminative_recipes(model, batch, method, settings, pulls):
    """SPEC's sums, class by class in float64, on first sight of every class; ``pulls`` names each view's centroid."""
    f, g = (model.features(view).detach().double() for view in batch[:2])
    weight, bias = model.fc.weight.detach().double(), model.fc.bias.detach().double()
    variance = margin = regularization = 0.0
    for c in (0, 2, 3):
        mine = batch.target == c
        mu = f[mine].mean(0)
        for features, pull in zip((f, g), pulls, strict=True):
            if pull is None:
                continue
            center = mu if pull == "clean" else features[mine].mean(0)
            variance += ((features[mine] - center).norm(dim=1) - 0.2).clamp(min=0).square().mean() / 2 / 3
        scores = [((weight[i] - weight[c]) @ mu + bias[i] - bias[c]) / (weight[i] - weight[c]).norm()
                  for i in range(4) if i != c]  # fmt: skip
        margin += max(2.0 + max(scores), 0) / 3
        regularization += mu.norm() / 3
    noisy_share = settings.get("noisy_share", 0.0)
    entropies = [cross_entropy(model, view, batch.target) for view in batch[:2]]
    expected = (
        (1 - noisy_share) * entropies[0]
        + noisy_share * entropies[1]
        + 0.7 * (1.5 * variance + 0.5 * margin + 0.1 * regularization)
    )
    config = Config(
        method, inter_dim=5, loss_weight=0.7, delta_var=0.2, delta_dist=2.0, alpha=1.5, beta=0.5, gamma=0.1, **settings
    )
    recipe = recipe_of(config, model)
    assert objective(recipe, batch).item() == pytest.approx(float(expected), rel=1e-5)
    losses = [module for module in recipe.modules() if isinstance(module, robustfast.DiscriminativeLoss)]
    assert len(losses) == 1 + (pulls[1] == "own")
    for loss in losses:
        assert loss.seen.tolist() == [True, False, True, True]
        assert loss.momentum == config.centroid_momentum and loss.norm == config.norm


# --- models ----------------------------------------------------------------------------------------------------------


def test_resnet18_is_the_papers():
    model = models.build("resnet18", channels=3, inter_dim=128, num_classes=10, seed=0)
    # 11,173,962 with 512 -> 10; here 512 -> 128 -> 10.
    assert sum(p.numel() for p in model.parameters()) == 11_173_962 - 5_130 + (512 * 128 + 128) + (128 * 10 + 10)
    shapes = [tuple(module.weight.shape) for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(shapes) == 20 and shapes[0] == (64, 3, 3, 3) and model.backbone[0].stride == (1, 1)
    x = torch.rand(2, 3, 32, 32)
    sizes = []
    for layer in model.backbone:
        x = layer(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes[2] == (64, 32, 32) and sizes[4] == (64, 32, 32) and sizes[6] == (128, 16, 16)
    assert sizes[8] == (256, 8, 8) and sizes[10] == (512, 4, 4) and sizes[-1] == (512,)
    assert model.features(torch.rand(2, 3, 32, 32)).shape == (2, 128) and isinstance(model.penultimate, nn.Linear)


def test_a_block_adds_its_shortcut():
    block = models.Block(8, 16, 2).eval()
    x = torch.randn(2, 8, 6, 6)
    inner = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), F.relu(inner + block.shortcut(x)))
    assert len(models.Block(8, 8, 1).shortcut) == 0


@pytest.mark.parametrize(
    ("name", "size"),
    [("small", (8, 8)), ("small", (32, 32)), ("small", (28, 20)), ("lenet", (28, 28)), ("lenet", (12, 40))],
)
def test_models_take_any_size(name, size):
    model = models.build(name, channels=3, inter_dim=7, num_classes=4, seed=0)
    images = torch.rand(2, 3, *size)
    torch.testing.assert_close(model(images), model.fc(model.features(images)))
    assert model.features(images).shape == (2, 7)


def test_images_too_small_for_a_model_are_named(tiny, tmp_path):
    arrays = dict(np.load(tiny.data.removeprefix("npz:")))
    np.savez(tmp_path / "a.npz", **{name: a[:, :5, :1] if name[0] == "x" else a for name, a in arrays.items()})
    config = replace(tiny, data=f"npz:{tmp_path / 'a.npz'}")
    with pytest.raises(ValueError, match=r"^model: small needs images of 2x2 pixels or more, got 5x1$"):
        prepare(config)
    prepare(replace(config, model="resnet18"))
    with pytest.raises(ValueError, match=r"^model: lenet needs images of 12x12 pixels or more, got 8x8$"):
        prepare(replace(tiny, model="lenet"))


def test_a_seed_fixes_the_weights_and_nothing_else():
    state = torch.get_rng_state()
    first, again, other = (models.build("small", 1, 4, 3, seed).fc.weight for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


# --- settings --------------------------------------------------------------------------------------------------------


def test_cifar10_preset_is_the_papers():
    config = preset("cifar10")
    expected = {
        "method": "discriminative", "model": "resnet18", "inter_dim": 128, "sigma": 0.06, "noise_view": "independent",
        "loss_weight": 1.0, "delta_var": 0.5, "delta_dist": 5.0, "norm": 2, "alpha": 1.0, "beta": 1.0, "gamma": 0.001,
        "centroid_momentum": 0.99, "epochs": 200, "batch_size": 64, "lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4,
        "milestones": (60, 120, 160), "decay": 0.2, "crop": 4, "flip": True,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    rates = [config.learning_rate(epoch) for epoch in (0, 59, 60, 119, 120, 159, 160, 199)]
    assert rates == pytest.approx([1e-3, 1e-3, 2e-4, 2e-4, 4e-5, 4e-5, 8e-6, 8e-6])
    (group,) = Run(prepare(replace(config, data="digits", model="small"))).optimizer.param_groups
    assert group["nesterov"] and group["momentum"] == 0.9 and group["weight_decay"] == 5e-4


def test_digits_presets_are_what_tuning_found():
    tuning = json.loads((ROOT / "benchmarks" / "results" / "digits_tuning.json").read_text())
    for method in METHODS:
        config = preset("digits", method)
        best = tuning["best"][method]
        assert {name: getattr(config, name) for name in best} == best
    assert len({len(trials) for trials in tuning["trials"].values()}) == 1, "every method has the same budget"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("method", "magic", "one of normal, noisy, both, stability, discriminative, discriminative-both"),
        ("model", "vgg", "one of small, lenet, resnet18, timm:NAME or package.module:factory"),
        ("model", "timm:", "one of small, lenet, resnet18, timm:NAME or package.module:factory"),
        ("schedule", "linear", "one of step, cosine"),
        ("amp", "fp8", "one of none, bf16, fp16"),
        ("ema", 1.0, "0 <= ema < 1"),
        ("accumulate", 0, "at least 1"),
        ("crop_area", 0.0, "0 < crop_area <= 1"),
        ("noise_view", "other", "one of same, independent"),
        ("alignment", "both", "one of clean, own, none"),
        ("noisy_share", 1.5, "0 <= noisy_share <= 1"),
        ("sigma_spread", -0.5, "0 <= sigma_spread <= 1"),
        ("epochs", 0, "at least 1"),
        ("sigma", -0.1, "a finite number >= 0"),
        ("lr", math.nan, "a finite number >= 0"),
        ("momentum", 1.0, "0 <= momentum < 1"),
        ("validation", 0.0, "0 < validation < 1"),
        ("test_sigmas", (0.1, math.inf), "finite numbers >= 0"),
        ("norm", 3, "1 or 2"),
        ("epochs", 1.5, "int"),
        ("epochs", True, "int"),
        ("lr", "fast", "float"),
        ("milestones", 5, "ints"),
        ("milestones", (1, 2.5), "ints"),
        ("flip", 1, "bool"),
        ("threads", -1, "a finite number >= 0"),
    ],
)
def test_settings_are_checked(name, value, expected):
    with pytest.raises(ValueError, match=rf"^{name}: expected {re.escape(expected)}, got"):
        Config(**{name: value})


def test_settings_survive_json():
    config = preset("cifar10", "stability", seed=4)
    assert from_json(json.loads(json.dumps(config.as_json()))) == config
    with pytest.raises(ValueError, match="unknown settings: colour"):
        from_json({"colour": 1})
    with pytest.raises(ValueError, match="preset: expected one of digits, cifar10, got 'mnist'"):
        preset("mnist")


@pytest.mark.parametrize(
    ("name", "value"), [("device", "tpu"), ("backend", "fast"), ("device", "cuda"), ("backend", "cuda")]
)
def test_what_cannot_run_is_a_value_error_and_leaves_no_folder(name, value, tmp_path):
    if value == "cuda" and torch.cuda.is_available():
        pytest.skip("it can run here")
    with pytest.raises(ValueError, match=name):
        train(Config(**{name: value}), tmp_path / "runs" / "run")
    assert not list(tmp_path.iterdir())


# --- batches ---------------------------------------------------------------------------------------------------------


def epoch_views(config, epoch):
    """Batches of an epoch as clean, noisy (N, C, H, W) by position in the training images, in [0, 1]."""
    setup = prepare(config)
    order = torch.randperm(
        len(setup.train_ids), generator=torch.Generator().manual_seed(stream(config.seed, "order", epoch))
    )
    batches = [batch for _, batch in batching.batches(setup, epoch)]
    clean, noisy, target = (torch.cat(part) for part in zip(*batches, strict=True))
    mean, std = (torch.tensor(setup.normalization[key]).view(-1, 1, 1) for key in ("mean", "pixel_std"))
    back = order.argsort()
    assert torch.equal(target[back], setup.train.labels)
    return setup, clean[back] * std + mean, noisy[back] * std + mean


def test_batches_are_the_images_and_the_images_with_noise(tiny):
    config = replace(tiny, crop=0, flip=False)
    setup, clean, noisy = epoch_views(config, 2)
    torch.testing.assert_close(clean, setup.train.pixels / 255, atol=1e-6, rtol=0)
    expected = robustfast.functional.gaussian_noise(
        setup.train.pixels / 255, config.sigma, seed=stream(config.seed, "noise"), sample_ids=setup.train_ids, draw=2
    )
    torch.testing.assert_close(noisy, expected, atol=1e-5, rtol=0)
    other_batches = epoch_views(replace(config, batch_size=5), 2)[2]
    torch.testing.assert_close(noisy, other_batches, atol=1e-5, rtol=0)
    assert (epoch_views(config, 3)[2] - noisy).abs().mean() > 0.05


def test_each_image_has_a_sigma_of_its_own(tiny):
    config = replace(tiny, crop=0, flip=False, sigma_spread=0.5)
    setup, clean, noisy = epoch_views(config, 2)
    sigmas = batching.draw_sigmas(config, len(clean), 2, clean.device)
    assert (sigmas > 0.5 * config.sigma).all() and (sigmas < 1.5 * config.sigma).all() and sigmas.std() > 0
    expected = robustfast.functional.gaussian_noise(
        setup.train.pixels / 255, sigmas, seed=stream(config.seed, "noise"), sample_ids=setup.train_ids, draw=2
    )
    torch.testing.assert_close(noisy, expected, atol=1e-5, rtol=0)
    assert not torch.equal(sigmas, batching.draw_sigmas(config, len(clean), 3, clean.device))


def test_same_and_independent_views(tiny):
    still = replace(tiny, sigma=0.0)
    _, clean, noisy = epoch_views(still, 0)
    assert torch.equal(clean, noisy)
    _, independent_clean, independent_noisy = epoch_views(replace(still, noise_view="independent"), 0)
    assert torch.equal(clean, independent_clean)
    moved = (clean != independent_noisy).flatten(1).any(1)
    assert moved.float().mean() > 0.8  # 17 of 18 placements differ
    sums = [view.flatten(1).sum(1) for view in (prepare(still).train.pixels / 255, independent_noisy)]
    assert (sums[1] <= sums[0] + 1e-3).all()  # the same image, less what the crop cut


def test_augmentation_changes_with_the_epoch_and_not_with_the_batches(tiny):
    config = replace(tiny, sigma=0.0)
    first = epoch_views(config, 0)[1]
    assert torch.equal(first, epoch_views(replace(config, batch_size=7), 0)[1])
    assert (first != epoch_views(config, 1)[1]).flatten(1).any(1).float().mean() > 0.8


def test_streams_are_apart():
    seeds = {stream(seed, name, epoch) for seed in range(3) for name in ("order", "places") for epoch in range(3)}
    assert len(seeds) == 18 and all(0 <= seed < 2**63 for seed in seeds)


# --- the loop --------------------------------------------------------------------------------------------------------


def test_the_best_epoch_is_kept_and_the_test_set_seen_once(tiny, tmp_path, monkeypatch):
    """Scores of 3, 9, 9, 5 on validation: the third epoch's weights are those tested."""
    scores, weights, tested = iter([0.3, 0.9, 0.9, 0.5]), [], []
    setup = prepare(tiny)

    def curve(model, images, sigmas, **settings):
        if torch.equal(images.labels, setup.test.labels):
            tested.append(model.fc.weight.clone())
            return [{"sigma": 0.0, "accuracy": 1.0}]
        weights.append(model.fc.weight.detach().clone())
        score = next(scores)
        return [{"sigma": 0.0, "accuracy": score}, {"sigma": tiny.sigma, "accuracy": score}]

    monkeypatch.setattr(loop, "noise_curve", curve)
    results = train(tiny, tmp_path)
    assert results["best_epoch"] == 3 and len(tested) == 1
    assert torch.equal(tested[0], weights[2]) and not torch.equal(weights[2], weights[3])
    assert torch.equal(load_file(tmp_path / files.MODEL)["fc.weight"], weights[2])


def test_a_diverging_run_says_so(tiny):
    with pytest.raises(FloatingPointError, match=r"epoch \d: the loss is .*; a lower learning rate may help"):
        train(replace(tiny, lr=1e20))


def test_results_have_the_documented_fields(tiny):
    documented = {
        table: set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", rows, re.M))))
        for table, rows in re.findall(r"^\| `?([\w ]+?)`? \| content \|\n\| --- \| --- \|\n((?:\|.*\n)+)",
                                      (ROOT / "docs" / "results.md").read_text(), re.M)
    }  # fmt: skip
    results = train(replace(tiny, epochs=1))
    documents = {"field", "data", "history", "environment", "field of the demo", "field of an evaluation", "summary"}
    assert documented.keys() == documents
    assert documented["field"] == results.keys() and documented["history"] == results["history"][0].keys()
    assert documented["data"] == results["data"].keys() and documented["environment"] == results["environment"].keys()
    assert results["config"].keys() == {field.name for field in fields(Config)}
    assert [point["sigma"] for point in results["test"]] == [0.0, *tiny.test_sigmas]


def history(config):
    return [record["loss"] for record in train(config)["history"]]


def test_parts_of_a_step_add_up_to_it(tiny):
    """Of a mean over samples; parts of 49 images in 8s, the last alone, are uneven."""
    config = replace(tiny, method="both", epochs=2)
    expected = history(config)
    for accumulate in (2, 3, 100):
        assert history(replace(config, accumulate=accumulate)) == pytest.approx(expected, rel=1e-4)
    parts = batching._parts(torch.arange(8), 3)
    assert [part.positions.tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [part.share for part in parts] == [3 / 8, 3 / 8, 2 / 8] and [part.last for part in parts] == [0, 0, 1]


def linear(num_classes):
    """A model that costs nothing, in float16 neither: convolutions on the CPU are slow in that."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))


LINEAR = f"{__name__}:linear"


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains(tiny, amp):
    config = replace(tiny, epochs=2, amp=amp, model=LINEAR, lr=1e-4)
    setup = prepare(config)
    run = Run(setup)
    seen = []
    run.model.fc.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    losses = [loop.train_epoch(setup, run)["loss"] for _ in range(2)]
    assert seen[0] == run.dtype and seen[-1] == torch.float32, "validation is in full precision"
    assert run.model.fc.weight.dtype == run.classifier.loss.centroids.dtype == torch.float32
    assert losses == pytest.approx(history(replace(config, amp="none")), rel=0.2)


def test_the_scaler_leaves_out_what_is_not_finite(tiny, monkeypatch):
    """The first step's scale is far too large; the others' loss counts, and a run in which none is taken fails."""
    setup = prepare(replace(tiny, amp="fp16", epochs=1, model=LINEAR))
    run = Run(setup)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    before = run.model.fc.weight.clone()
    batch = next(iter(batching.batches(setup, 0)))
    run.classifier.train()
    run.backward(*reversed(batch))
    run.step(0.1)
    assert torch.equal(run.model.fc.weight, before) and run.scaler.get_scale() == 2.0**10
    assert run.classifier.loss.centroids.isfinite().all()
    with torch.no_grad():
        run.model.fc.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="epoch 1: the loss is nan"):
        loop.train_epoch(setup, run)


def test_averaged_weights_are_evaluated_and_kept(tiny, tmp_path):
    config = replace(tiny, epochs=1, ema=0.75)
    weights = []
    step = Run.step

    def followed(run, rate):
        step(run, rate)
        weights.append(run.model.fc.weight.detach().clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", followed)
        train(config, tmp_path)
    expected = weights[0]
    for weight in weights[1:]:
        expected = 0.75 * expected + 0.25 * weight
    kept = load_file(tmp_path / files.MODEL)["fc.weight"]
    torch.testing.assert_close(kept, expected)
    assert (kept - weights[-1]).abs().max() > 1e-4


def test_schedules():
    config = Config(lr=0.5, warmup=2.0, epochs=10, schedule="cosine")
    rates = [config.learning_rate(epoch) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0.005, 0.2525, 0.5, 0.25, 0])
    config = replace(config, schedule="step", milestones=(4,), decay=0.1)
    assert [config.learning_rate(epoch) for epoch in (0.5, 3.99, 4)] == pytest.approx([0.12875, 0.5, 0.05])


def test_the_learning_rate_moves_within_an_epoch(tiny, monkeypatch):
    rates, step = [], Run.step
    monkeypatch.setattr(Run, "step", lambda run, rate: (rates.append(rate), step(run, rate)))
    config = replace(tiny, epochs=2, batch_size=16, schedule="cosine")
    history = train(config)["history"]
    assert rates == pytest.approx([config.learning_rate(i / 3) for i in range(6)], rel=1e-9)
    assert [record["lr"] for record in history] == [config.learning_rate(0), config.learning_rate(1)]


def test_a_compiled_run_is_the_eager_one(tiny, monkeypatch):
    """With the compiler's own backend it takes minutes here."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    config = replace(tiny, epochs=2, batch_size=10)
    assert history(replace(config, compile=True)) == pytest.approx(history(config), rel=1e-3)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_models_of_others(tiny, tmp_path):
    """Their last layer is the penultimate one."""
    config = replace(tiny, model=LINEAR, epochs=1)
    train(config, tmp_path)
    classifier = load_classifier(tmp_path)
    assert classifier.model.backbone[1].out_features == config.inter_dim == classifier.fc.in_features
    assert classifier.features(torch.rand(2, 3, 8, 8)).shape == (2, config.inter_dim)
    for name, reason in (
        ("nowhere:net", "No module named 'nowhere'"),
        (f"{__name__}:nothing", "has no attribute 'nothing'"),
        ("torch.nn:Flatten", "num_classes"),
        ("builtins:dict", "expected a torch.nn.Module, got dict"),
    ):
        with pytest.raises(ValueError, match=rf"^model: {name}: .*{reason}"):
            Run(prepare(replace(config, model=name)))


def test_timm_is_named_where_it_is_missing(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match=r"^timm is not installed; install it with: pip install timm$"):
        Run(prepare(replace(tiny, model="timm:resnet18")))


# --- evaluation ------------------------------------------------------------------------------------------------------


class Threshold(nn.Module):
    """Class 1 where the first pixel is above its threshold."""

    def forward(self, images):
        return torch.stack([torch.zeros(len(images)), images[:, 0, 0, 0]], 1)


def test_accuracy_is_a_count_over_known_noise(monkeypatch):
    pixels = torch.rand(30, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    labels = (pixels[:, 0, 0, 0] > 0.5).long()
    settings = {"mean": [0.5], "pixel_std": [0.2]}
    model = Threshold()
    assert accuracy(model, pixels, labels, **settings) == 1.0
    expected = [
        float(
            ((robustfast.functional.gaussian_noise(pixels, 0.4, seed=4, draw=draw)[:, 0, 0, 0] > 0.5) == labels).sum()
        )
        for draw in range(2)
    ]
    assert expected[0] != expected[1]
    assert accuracy(model, pixels, labels, 0.4, seed=4, draws=2, **settings) == sum(expected) / 60
    monkeypatch.setattr(noise, "BATCH", 7)
    assert accuracy(model, pixels, labels, 0.4, seed=4, draws=2, **settings) == sum(expected) / 60
    assert noise_curve(model, pixels, labels, [0.4], seed=4, **settings)[0] == {"sigma": 0.0, "accuracy": 1.0}
    with pytest.raises(ValueError, match="at least one image"):
        accuracy(model, pixels[:0], labels[:0], **settings)


@pytest.mark.parametrize("training", [True, False])
def test_accuracy_is_in_evaluation_mode_and_leaves_no_trace(training):
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 2)).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accuracy(model, torch.rand(5, 1, 2, 2), torch.zeros(5, dtype=torch.int64), mean=[0.0], pixel_std=[1.0])
    assert model.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_validation_is_neither_trained_on_nor_tested(tiny):
    setup = prepare(replace(tiny, validation=0.5))
    pool = data.load(tiny.data).train
    held_out = torch.tensor(sorted(set(range(66)) - set(setup.train_ids.tolist())))
    assert torch.equal(setup.train.pixels, pool.pixels[setup.train_ids])
    assert torch.equal(setup.validation.pixels, pool.pixels[held_out]) and len(held_out) == 33
    assert setup.normalization["mean"] == data.channel_statistics(setup.train.pixels)[0]
