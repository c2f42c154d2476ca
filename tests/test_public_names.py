"""What `import megakd` offers: light until it is used, documented, and with examples that run as they stand."""

from __future__ import annotations

import doctest
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import megakd
from megakd.data.shapes import write_world
from support.runs import RECIPE, REPOSITORY, environment

WRITTEN = REPOSITORY / "tests" / "golden" / "written"
FUNCTIONS = ("load_recipe", "train", "evaluate", "load_model", "load_bundle")  # in the order of their examples


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True).stdout


def test_importing_megakd_takes_less_than_a_third_of_a_second_and_no_library() -> None:
    timed = "start = time.perf_counter(); import megakd; print(time.perf_counter() - start, {'torch', 'pydantic'} & set(sys.modules))"
    code = f"import sys, time; {timed}"
    measured = [_python(code).split(maxsplit=1) for _ in range(3)]
    assert statistics.median(float(seconds) for seconds, _ in measured) < 0.3
    assert all(loaded.strip() == "set()" for _, loaded in measured)


def test_recipes_are_read_without_torch_and_names_are_listed_before_they_are_imported() -> None:
    assert _python("import sys, megakd; print(megakd.load_recipe('smoke').name, 'torch' in sys.modules)") == "smoke False\n"
    assert _python("import sys, megakd; print(set(megakd.__all__) <= set(dir(megakd)), 'torch' in sys.modules)") == "True False\n"


def test_every_public_name_is_there_and_no_other() -> None:
    assert set(megakd.__all__) == {"Recipe", "__version__", *FUNCTIONS}
    assert all(getattr(megakd, name) is not None for name in megakd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load_models'"):
        megakd.load_models  # noqa: B018 - the access is what is tested


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the examples find it: a small shapes world in data/shapes, a bundle of an earlier run in runs/vqa."""
    folder = tmp_path_factory.mktemp("desk")
    write_world(folder / "data" / "shapes", train=64, test=16, zeroshot_per_class=1)
    shutil.copytree(WRITTEN / "vqa_lora" / "bundle", folder / "runs" / "vqa" / "bundle")
    return folder


def test_the_examples_of_all_public_functions_run_as_they_are_printed(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    names = {"megakd": megakd, "Image": Image}
    for name in FUNCTIONS:
        function = getattr(megakd, name)
        text = function.__doc__
        assert "Raises ValueError" in text, name
        test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
        assert test.examples, name
        failures: list[str] = []
        runner.run(test, out=failures.append, clear_globs=False)
        assert not failures, "".join(failures)


def test_a_loaded_model_encodes_as_open_clip_does(desk: Path) -> None:
    import open_clip

    model = megakd.load_model(WRITTEN / "smoke_teacher", "cpu")
    theirs, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{WRITTEN / 'smoke_teacher' / 'model'}")
    picture = Image.new("RGB", (60, 44), (200, 30, 30))
    picture.save(desk / "red.png")
    with torch.no_grad():
        expected = theirs.eval().encode_image(prepare(picture).unsqueeze(0), normalize=True)
    torch.testing.assert_close(model.encode_images([picture]), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.encode_images([str(desk / "red.png")]), model.encode_images([picture]))
    assert model.scale == pytest.approx(float(theirs.logit_scale.detach().exp()))
    assert model.bias == pytest.approx(float(theirs.logit_bias.detach()))
    assert model.encode_texts([]).shape == model.encode_images([]).shape == (0, model.width)


def test_mistakes_name_the_folder_or_the_key(desk: Path, recipe_file: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no model in it .*finish the run first"):
        megakd.load_model(desk / "nowhere")
    with pytest.raises(ValueError, match="nowhere: no run folder"):
        megakd.evaluate(desk / "nowhere")
    with pytest.raises(ValueError, match="nowhere: no bundle"):
        megakd.load_bundle(desk / "nowhere")
    with pytest.raises(ValueError, match=r"absent\.png: cannot be read"):
        megakd.load_model(WRITTEN / "smoke_teacher").encode_images([desk / "absent.png"])
    with pytest.raises(ValueError, match=r"did you mean 'optim.steps'"):
        megakd.train(recipe_file, desk / "never", ["optim.stpes=3"])
    assert not (desk / "never").exists()


def test_a_recipe_in_memory_reaches_the_run_and_what_the_run_says_of_a_mistake_is_the_error(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(world=world), encoding="utf-8")
    recipe = megakd.load_recipe(path, [f"data.train={tmp_path}/nowhere/*.tar"])
    with pytest.raises(ValueError, match=rf"^data\.train: no shard {tmp_path}/nowhere") as error:
        megakd.train(recipe, tmp_path / "run", ranks=1)
    assert str(error.value) in capsys.readouterr().out
    assert "Traceback" not in str(error.value)
