"""Means of int8 images of one pixel or one channel, where torch's kernel fails by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plans import net_of
from runs import silent
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.model.integers import plainly_laid_out

RECIPE = "builtin:x86-static-minmax"

pytestmark = pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")


def _images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _of_pixels(self, x):
    return self.head(F.relu(self.conv(x)).mean([2, 3]))


def _of_columns(self, x):
    return self.head(F.relu(self.conv(x)).mean(-1).flatten(1))


def _of_volumes(self, x):
    return self.head(F.relu(self.conv(x)).mean((2, 3, 4)))


def _of_everything(self, x):
    return self.head(F.relu(self.conv(x))) * F.relu(self.conv(x)).mean()


def _network(forward, conv, head):
    torch.manual_seed(0)
    return net_of(forward, conv=conv, head=head)


CASES = {
    "one pixel": (_of_pixels, nn.Conv2d, 8, 8, (1, 1)),
    "one channel": (_of_pixels, nn.Conv2d, 1, 1, (6, 6)),
    "one column": (_of_columns, nn.Conv2d, 8, 8, (1, 1)),
    "one voxel": (_of_volumes, nn.Conv3d, 8, 8, (1, 1, 1)),
    "one channel of volumes": (_of_volumes, nn.Conv3d, 1, 1, (3, 3, 3)),
}


def _case(name):
    forward, convolution, channels, features, size = CASES[name]
    model = _network(forward, convolution(4, channels, 1), nn.Linear(features, 5))
    return model, [_images(6, 4, *size) + k for k in range(3)]


@pytest.mark.parametrize("name", CASES)
def test_a_mean_is_int8_and_right(name):
    model, batches = _case(name)
    converted = qrecipe.quantize(model, RECIPE, batches, progress=silent)
    means = [site for site in qrecipe.plan(model, RECIPE, batches[0]).sites if site.op == "mean"]
    assert [site.mode for site in means] == ["static"]
    assert converted(batches[0]).shape == (6, 5)
    assert sqnr_db(model(batches[0]), converted(batches[0])) > 25


def test_a_model_of_larger_images_takes_images_of_one_pixel_too():
    model = _network(_of_pixels, nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 5))
    larger, pixels = _images(4, 4, 8, 8), _images(4, 4, 1, 1)
    converted = qrecipe.quantize(model, RECIPE, [larger, larger], progress=silent)
    assert sqnr_db(model(pixels), converted(pixels)) > 15
    assert torch.equal(converted(pixels)[:1], converted(pixels[:1]))


def test_a_mean_of_everything_is_a_number():
    model = _network(_of_everything, nn.Conv2d(4, 8, 1), nn.Conv2d(8, 5, 1))
    x = _images(3, 4, 1, 1)
    converted = qrecipe.quantize(model, RECIPE, [x, x], progress=silent)
    assert sqnr_db(model(x), converted(x)) > 25


@pytest.mark.parametrize("name", ["one pixel", "one channel"])
def test_it_survives_storage_and_script(name, tmp_path):
    model, batches = _case(name)
    converted = qrecipe.quantize(model, RECIPE, batches, progress=silent)
    file = tmp_path / "model.safetensors"
    qrecipe.save_quantized(converted, file)
    loaded = qrecipe.load_quantized(file, _case(name)[0])
    for each in (loaded, torch.jit.script(converted), torch.jit.trace(converted, batches[0])):
        assert torch.equal(each(batches[0]), converted(batches[0]))


def test_other_means_are_read_as_they_are():
    def gate(self, x):
        return self.head(x * torch.sigmoid(self.conv(x).mean([2, 3], keepdim=True)))

    model = _network(gate, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 5, 1))
    x = _images(3, 4, 6, 6)
    converted = qrecipe.quantize(model, RECIPE, [x, x], progress=silent)
    assert plainly_laid_out not in [node.target for node in converted.graph.nodes]


def test_an_image_of_one_layout_is_not_copied():
    x = _images(2, 4, 6, 6)
    last = x.contiguous(memory_format=torch.channels_last)
    assert plainly_laid_out(x) is x
    assert plainly_laid_out(last) is last
    assert plainly_laid_out(_images(2, 4)).shape == (2, 4)
