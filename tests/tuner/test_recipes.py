"""Built-in recipes: the table, the data, the trained models, and that a cache changes nothing."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from sklearn.datasets import load_digits
from torch import nn

from tuner import recipes
from tuner.errors import DataError, UnknownNameError
from tuner.recipes import Task, cache, char_lm, digits_vit_outliers
from tuner.recipes.base import TrainingParameters
from tuner.recipes.digits import TopOneAccuracy, digits
from tuner.recipes.docstring_pairs import Pair, docstring_pairs

SHORT = {"epochs": 1}
DIGIT_RECIPES = ("digits-resnet", "digits-depthwise", "digits-vit-outliers")


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "accutune"


def _weights(task: Task) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in task.model.state_dict().items()}


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_recipe_is_found_by_its_own_name() -> None:
    assert recipes.names() == (*DIGIT_RECIPES, "char-lm", "minilm-retrieval", "arrays")
    for name in recipes.names():
        assert recipes.get(name).name == name


def test_an_unknown_name_is_refused_with_the_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="digits-resnet"):
        recipes.get("digit-resnet")


@pytest.mark.parametrize("values", [{"epochs": 0}, {"seed": -1}, {"epoch": 3}])
def test_bad_parameters_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        recipes.get("digits-resnet").task(**values)


def test_digits_are_all_there_and_no_test_image_is_trained_on() -> None:
    data = digits()
    assert len(data.train_images) == 1000
    assert len(data.test_images) == 797
    images = torch.cat([data.train_images, data.test_images]).flatten(1)
    assert len({tuple(row) for row in images.tolist()}) == len(load_digits().images)


def test_accuracy_is_the_share_of_right_answers() -> None:
    images = torch.eye(4).repeat(3, 1)
    labels = torch.tensor([0, 1, 2, 3] * 2 + [1, 2, 3, 0])
    assert TopOneAccuracy(images, labels, batch_size=5)(nn.Identity()) == pytest.approx(8 / 12)


@pytest.mark.parametrize(
    ("name", "at_least"),
    [("digits-resnet", 0.97), ("digits-depthwise", 0.97), ("digits-vit-outliers", 0.95)],
)
def test_a_trained_model_knows_digits(name: str, at_least: float) -> None:
    task = recipes.get(name).task()
    assert not task.model.training
    assert task.eval_func(task.model) >= at_least
    assert sum(len(batch) for batch in task.calib_dataloader) == 256


def test_a_language_model_learns_more_than_the_commonest_character() -> None:
    task = recipes.get("char-lm").task(epochs=1, windows=300)
    tokens = task.eval_func.windows[:, 1:]
    commonest = tokens.flatten().bincount().max() / tokens.numel()
    assert task.eval_func(task.model) > commonest
    assert tokens.numel() == 128 * 128


def test_the_language_models_head_is_its_embedding() -> None:
    assert char_lm.CharLM(tied=True).head.weight.shape == (97, 128)
    tied, untied = char_lm.CharLM(tied=True), char_lm.CharLM(tied=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight


def test_characters_have_tokens_of_their_own() -> None:
    printable = "\n" + "".join(map(chr, range(32, 127)))
    assert char_lm.encode(printable).tolist() == list(range(96))
    assert char_lm.encode("é\t").tolist() == [96, 96]


def test_missing_source_text_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match=r"argparse\.py cannot be read"):
        recipes.get("char-lm").task(**SHORT)


def test_a_causal_model_does_not_see_what_comes_after() -> None:
    model = char_lm.CharLM(tied=True).eval()
    tokens = torch.randint(0, 97, (1, 32))
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 97
    torch.testing.assert_close(model(tokens)[:, :20], model(changed)[:, :20])
    assert not torch.allclose(model(tokens)[:, 20:], model(changed)[:, 20:])


def test_depthwise_has_22_convolutions_and_linears() -> None:
    model = recipes.get("digits-depthwise").task(**SHORT).model
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == 22


def test_outliers_change_the_range_but_not_the_function() -> None:
    recipe = recipes.get("digits-vit-outliers")
    plain = recipe.task(**SHORT, outlier_factor=1.0).model
    spread = recipe.task(**SHORT).model
    images = digits().test_images[:64]
    torch.testing.assert_close(spread(images), plain(images), rtol=1e-3, atol=1e-4)
    for before, after in zip(plain.blocks, spread.blocks, strict=True):
        x = torch.randn(8, digits_vit_outliers._WIDTH)
        assert after.norm1(x).abs().max() > 10 * before.norm1(x).abs().max()


def test_the_same_seed_gives_the_same_weights(no_cache: Path) -> None:
    recipe = recipes.get("digits-resnet")
    first = _weights(recipe.task(**SHORT))
    for file in no_cache.iterdir():
        file.unlink()
    torch.rand(3)
    assert _equal(_weights(recipe.task(**SHORT)), first)
    assert not _equal(_weights(recipe.task(**SHORT, seed=1)), first)


def test_building_leaves_the_random_state_alone(no_cache: Path) -> None:
    before = torch.get_rng_state()
    recipes.get("digits-vit-outliers").task(**SHORT)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["digits-resnet", "digits-vit-outliers"])
def test_cached_weights_are_the_trained_ones(name: str, no_cache: Path) -> None:
    trained = _weights(recipes.get(name).task(**SHORT))
    (file,) = no_cache.iterdir()
    written = file.stat().st_mtime_ns
    assert _equal(_weights(recipes.get(name).task(**SHORT)), trained)
    assert file.stat().st_mtime_ns == written


def test_tied_weights_stay_tied_after_the_cache(no_cache: Path) -> None:
    file = cache.path_of("tied", TrainingParameters(), b"")
    cache.trained(char_lm.CharLM(tied=True), file, lambda net: None)
    again = cache.trained(char_lm.CharLM(tied=True), file, _must_not_train)
    assert again.head.weight is again.embedding.weight


@pytest.mark.parametrize("damage", [b"", b"no safetensors", None])
def test_a_damaged_cache_file_is_replaced(damage: bytes | None, no_cache: Path) -> None:
    recipe = recipes.get("digits-resnet")
    trained = _weights(recipe.task(**SHORT))
    (file,) = no_cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2] if damage is None else damage)
    assert _equal(_weights(recipe.task(**SHORT)), trained)
    assert file.read_bytes() == good


def test_a_file_of_another_architecture_is_replaced(no_cache: Path) -> None:
    file = cache.path_of("x", TrainingParameters(), b"")
    cache.trained(nn.Linear(2, 3), file, lambda net: None)
    calls: list[nn.Module] = []
    cache.trained(nn.Linear(2, 4), file, calls.append)
    assert len(calls) == 1
    cache.trained(nn.Linear(2, 4), file, _must_not_train)


def test_a_cache_that_cannot_be_written_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    task = recipes.get("digits-resnet").task(**SHORT)
    assert 0 <= task.eval_func(task.model) <= 1


def test_an_interrupted_write_leaves_nothing(
    no_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, target: Path) -> Path:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    recipes.get("digits-resnet").task(**SHORT)
    assert list(no_cache.iterdir()) == []


def test_the_cache_name_changes_with_parameters_and_data() -> None:
    paths = {
        cache.path_of("a", TrainingParameters(), b"x"),
        cache.path_of("b", TrainingParameters(), b"x"),
        cache.path_of("a", TrainingParameters(seed=1), b"x"),
        cache.path_of("a", TrainingParameters(), b"y"),
    }
    assert len(paths) == 4


def _must_not_train(model: nn.Module) -> None:
    raise AssertionError("trained although the weights are cached")


def test_docstrings_of_a_folder_are_pairs_and_files_for_a_newer_python_have_none(
    tmp_path: Path,
) -> None:
    words = " ".join(f"word{index}" for index in range(20))
    source = f'def f():\n    """Return what no other text says.\n\n    {words}\n    """\n'
    (tmp_path / "ours.py").write_text(source)
    (tmp_path / "newer.py").write_text(f"match = case of : f\n{source}")
    assert docstring_pairs(tmp_path) == [Pair("Return what no other text says.", words)]
