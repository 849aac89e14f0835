"Every architecture of the book as an ONNX graph: equal to the model in eager mode, in onnxruntime, for several batch sizes and precisions."
import pytest
import torch
from torch import nn

from dlfund.data.preprocessing import ImagePreprocess
from dlfund.deployment.bundle import Bundle, build_model
from dlfund.deployment.export import ExportError, check_export, export_onnx
from dlfund.vision import MODELS

SIDES = {'alexnet': 63, 'lenet': 28} # others: 32 pixels
MASKS = ('unet_mini', 'fcn_mini')


def shaken(name, task='image-classification', seed=0):
    "A bundle of an untrained network whose parameters and statistics all differ."
    torch.manual_seed(seed)
    architecture, generator = dict(name=name, n_classes=5, n_channels=1), torch.Generator().manual_seed(seed)
    model = build_model(task, architecture)
    for v in [*model.parameters(), *model.buffers()]:
        if v.is_floating_point(): v.data += 0.02*torch.rand(v.shape, generator=generator)*v.data.abs().mean().clamp(min=0.01)
    side = SIDES.get(name, 32)
    return Bundle(model=model, architecture=architecture, task=task, labels=list('abcde'), metrics={}, data={}, training={},
                  preprocess=ImagePreprocess(size=(side, side), mean=(0.3,), std=(0.2,)))


@pytest.mark.parametrize('precision', ['float32', 'float16'])
@pytest.mark.parametrize('name', [*MODELS, *MASKS])
def test_graph_equals_model(name, precision):
    bundle = shaken(name, 'semantic-segmentation' if name in MASKS else 'image-classification')
    content = export_onnx(bundle, precision=precision)
    found = check_export(bundle, content, (1, 2, 7), precision=precision, generator=torch.Generator().manual_seed(1))
    assert set(found) == {1, 2, 7} and max(found.values()) <= 1e-5


def test_half_precision_halves_the_file():
    bundle = shaken('resnet-mini')
    assert len(export_onnx(bundle, precision='float16')) < 0.55*len(export_onnx(bundle))


def test_another_network_is_found_out():
    bundle, content = shaken('resnet-mini'), export_onnx(shaken('resnet-mini', seed=1))
    with pytest.raises(ExportError, match='must equal the model'): check_export(bundle, content)


@pytest.mark.parametrize('name', ['ssd_mini', 'yolo_mini', 'faster_rcnn_mini'])
def test_detectors_are_refused_in_one_sentence(name):
    with pytest.raises(ExportError, match=f'served from its bundle, got {name}'): export_onnx(shaken(name, 'object-detection'))


def test_a_question_about_values_is_named():
    class Choosy(nn.Module):
        def forward(self, x): return x if x.sum() > 0 else -x
    bundle = shaken('lenet')
    bundle.model = Choosy()
    with pytest.raises(ExportError, match=r'forward in test_deployment_export.py: it asks for the value of a tensor'): export_onnx(bundle)
