"""`ats.load`: a run's model in Python; and the core without what it needs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ats
from ats.experiments.training import train
from tests.helpers import seeded
from tests.test_training import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(tmp_path_factory.mktemp("load") / "run"))


def test_a_run_comes_back_with_its_weights_classes_and_preprocessing(checkpoint: Path) -> None:
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    before = torch.random.get_rng_state()
    trained = ats.load(checkpoint.parent.parent)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert trained.classes == tuple("0123456789")
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, saved[f"model.{name}"]), name
    assert not any(layer.training for layer in trained.model.modules())
    image = torch.randint(256, (1, 140, 120), dtype=torch.uint8, generator=seeded())
    assert trained.view(image).shape == (1, 1, 18, 15)  # about 0.12 of it, in whole cells of 3
    torch.testing.assert_close(trained.view(image), ats.area_downsample(image[None], (18, 15)))
    prediction = trained.predict(image, generator=seeded(3))
    assert prediction.logits.shape == (1, 10)
    assert torch.equal(trained(image, generator=seeded(3)), prediction.logits)
    as_floats = trained(image.float() / 255, generator=seeded(3))
    torch.testing.assert_close(as_floats, prediction.logits, rtol=1e-4, atol=1e-4)
    few = trained.predict(image, method="anytime", tolerance=1e9)
    assert few.patches_used.tolist() == [8]
    assert trained.predict(image, method="topk", n_patches=3).patches_used.tolist() == [3]


def test_a_run_on_another_device(checkpoint: Path) -> None:
    assert ats.load(str(checkpoint), device="meta").device.type == "meta"


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere; `ats train` writes"):
        ats.load(tmp_path / "nowhere")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt is not a checkpoint"):
        ats.load(tmp_path / "other.ckpt")


def test_the_core_does_without_the_extra_and_load_names_it() -> None:
    script = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('lightning', 'rich', 'tyro', 'PIL', 'scipy', 'matplotlib'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import ats\n"
        "assert not any(name.startswith('ats.experiments') for name in sys.modules), 'imported too early'\n"
        "try:\n"
        "    ats.load('run')\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("lightning is not installed; ats.load needs: pip install 'torch-ats[experiments]'")
