"The matrix: every architecture of the book, exported, against the program that it came from; and what must not be exported or opened."
import inspect, io, os, sys, zipfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
import onnx
from onnx.reference import ReferenceEvaluator

from dlfund.data.preprocessing import ImagePreprocess
from dlfund.deployment.bundle import Bundle, build_model
from dlfund.deployment.export import (ExportError, RawDetector, Servable, capture, capture_bundle, check_export,
                                      example_pictures, export_onnx, export_program, open_program, store_half, to_graph)
from dlfund.deployment.files import BundleError, attach, make_keys, sign_bundle
from dlfund.deployment.runtime import OnnxRunner, answer, open_session
from dlfund.vision import MODELS
from dlfund.vision.ssd import default_boxes, ssd_answers, ssd_mini
from dlfund.vision.yolo import expected_sides, sides_to_boxes, yolo_mini
from dlfund.vision.faster_rcnn import faster_rcnn_mini

BATCHES = (1, 2, 7)
SEGMENTATIONS = 'unet_mini', 'fcn_mini'
DETECTORS = dict(ssd_mini=ssd_mini, yolo_mini=yolo_mini, faster_rcnn_mini=faster_rcnn_mini)
SIZES = dict(lenet=28, alexnet=64) # pixels; all others take 32
N_CLASSES = 5


def shake(model, pictures, seed=0):
    "Weights that differ everywhere, and statistics that fit them, so that every mistake reaches the outputs."
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.rand(p.shape, generator=generator)
        if p.numel() == max(p.shape, default=1): p.data += 0.1 + 0.1*noise # biases, and scales that begin at 0
        else: p.data *= 1 + 0.2*(noise - 0.5)
    norms = [m for m in model.eval().modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms: m.momentum = 1.0
    for m in norms: m.train()
    with torch.no_grad(): model(pictures)
    for m in norms: m.running_mean += 0.1*torch.rand(m.running_mean.shape, generator=generator)
    return model.eval()


def make_bundle(name, n_channels=3, **args):
    "A shaken bundle of an architecture, for small pictures."
    size = SIZES.get(name, 32)
    architecture = dict(name=name, n_classes=N_CLASSES, n_channels=n_channels, **args)
    task = 'semantic-segmentation' if name in SEGMENTATIONS else 'image-classification'
    torch.manual_seed(0)
    model = build_model(task, architecture)
    shake(model, torch.randn(7, n_channels, size, size))
    preprocess = ImagePreprocess(size=(size, size), n_channels=n_channels, mean=(0.45, 0.4, 0.5)[:n_channels],
                                 std=(0.3, 0.25, 0.2)[:n_channels])
    return Bundle(model=model, architecture=architecture, labels=list('abcde'), preprocess=preprocess, metrics={},
                  data=dict(name='noise', sha256='', licence='', source='', n_test_reads=0), training={}, task=task)


def relative(got, want):
    "The largest difference, relative to the largest output (or to 1): what 1e-5 is about."
    got, want = (torch.as_tensor(x) for x in (got, want))
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max().clamp(min=1)).item()


def narrow(name):
    "Arguments that make an architecture small where it can be: all layers, an eighth of their channels."
    return dict(width=0.125) if 'width' in inspect.signature(MODELS.get(name, build_model)).parameters else {}


@pytest.mark.parametrize('name', [*MODELS, *SEGMENTATIONS])
def test_the_matrix(name):
    "Captured once; float32, float16 weights and float64; batches of 1, 2 and 7; onnxruntime and PyTorch's own graph."
    bundle = make_bundle(name, n_channels=1 if name in ('lenet', 'resnet-mini', 'fcn_mini') else 3, **narrow(name))
    generator = torch.Generator().manual_seed(1)
    batches = [example_pictures(bundle, n, generator) for n in BATCHES]
    eager, program = Servable(bundle), capture_bundle(bundle)
    with torch.inference_mode(): wanted = [eager(batch) for batch in batches]
    spread = wanted[-1].std(0).max() / wanted[-1].abs().max().clamp(min=1)
    assert spread > 1e-3, 'the outputs hardly depend on the picture, so nothing is tested'

    graph = to_graph(program, name=name)
    onnx.checker.check_model(graph)
    session = open_session(graph.SerializeToString(), 1)
    for batch, want in zip(batches, wanted):
        got = session.run(None, {'pictures': batch.numpy()})[0]
        assert got.dtype == np.float32 and relative(got, want) <= 1e-5
    opened = program.module()
    with torch.inference_mode():
        for batch, want in zip(batches, wanted): assert relative(opened(batch), want) <= 1e-5

    rounded = Servable(bundle, torch.float16)
    names = {n for n, p in rounded.named_parameters() if p.ndim > 1}
    for n, value in rounded.state_dict().items():
        if n in names: program.state_dict[n].data.copy_(value)
    half = to_graph(program, name=name, is_simplified=False)
    before = half.ByteSize()
    store_half(half)
    assert half.ByteSize() < (0.9 if name == 'lenet' else 0.75)*before
    session = open_session(half.SerializeToString(), 1)
    for batch in batches:
        with torch.inference_mode(): want = rounded(batch)
        assert relative(session.run(None, {'pictures': batch.numpy()})[0], want) <= 1e-5


@pytest.mark.parametrize('name', ['lenet', 'resnet-mini', 'convnext-mini', 'efficientnet-mini', 'unet_mini', 'fcn_mini'])
def test_float64(name):
    "In double precision the captured program is exact to 1e-12, and ONNX's own slow evaluator agrees; onnxruntime cannot."
    bundle = make_bundle(name)
    exact = Servable(bundle).double()
    program = capture(exact, example_pictures(bundle), name=name)
    opened = program.module()
    with torch.inference_mode():
        for n in BATCHES:
            batch = example_pictures(bundle, n, torch.Generator().manual_seed(n))
            assert relative(opened(batch), exact(batch)) <= 1e-12
    if name != 'lenet': return
    graph = to_graph(program, name=name)
    with torch.inference_mode(): want = exact(batch)
    assert relative(ReferenceEvaluator(graph).run(None, {'pictures': batch.numpy()})[0], want) <= 1e-12
    with pytest.raises(Exception, match='NOT_IMPLEMENTED'): open_session(graph.SerializeToString(), 1)


@pytest.mark.parametrize('name', DETECTORS)
def test_a_detectors_network_is_a_graph(name):
    "What a detector says before it chooses boxes equals eager, at all batch sizes and both precisions of weights."
    torch.manual_seed(0)
    detector = shake(DETECTORS[name](N_CLASSES), torch.rand(7, 1, 64, 64))
    raw, x = RawDetector(detector), torch.rand(7, 1, 64, 64)
    program = capture(raw, x[:2], name=name)
    session = open_session(to_graph(program, ('first', 'second'), name=name).SerializeToString(), 1)
    with torch.inference_mode():
        for n in BATCHES:
            for got, want, own in zip(session.run(None, {'pictures': x[:n].numpy()}), raw(x[:n]), program.module()(x[:n])):
                assert relative(got, want) <= 1e-5 and relative(own, want) <= 1e-5
                assert want.std() > 1e-3


@pytest.mark.parametrize('name', ['ssd_mini', 'yolo_mini'])
def test_the_choice_of_boxes_outside_of_the_graph(name):
    "The graph's answers, chosen from by the detector's own rules, are the detections of the whole detector."
    torch.manual_seed(0)
    detector = shake(DETECTORS[name](N_CLASSES), torch.rand(7, 1, 64, 64))
    x = torch.rand(3, 1, 64, 64)
    graph = to_graph(capture(RawDetector(detector), x[:2], name=name), ('first', 'second'), name=name)
    first, second = map(torch.from_numpy, open_session(graph.SerializeToString(), 1).run(None, {'pictures': x.numpy()}))
    with torch.inference_mode():
        wanted = detector(x)
        if name == 'ssd_mini':
            maps = detector.backbone(x)[-len(detector.config.strides):]
            anchors = default_boxes(detector.config, (64, 64), [m.shape[-2:] for m in maps])
            found = ssd_answers(second, first, anchors, (64, 64), detector.config)
        else:
            points, strides = detector.answer(x)[2:]
            boxes = sides_to_boxes(expected_sides(first), points, strides).clamp(0, 64)
            found = [detector.select(*parts) for parts in zip(boxes, second.sigmoid())]
    assert sum(len(w['boxes']) for w in wanted)
    for got, want in zip(found, wanted):
        assert torch.equal(got['labels'], want['labels'])
        assert_close(got['boxes'], want['boxes'], rtol=1e-4, atol=1e-3)
        assert_close(got['scores'], want['scores'], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', DETECTORS)
def test_a_whole_detector_is_refused_in_words(name):
    "By its bundle, and by the exporter itself when somebody tries."
    detector = DETECTORS[name](10)
    bundle = make_bundle('lenet', n_channels=1)
    bundle.task, bundle.architecture, bundle.model = 'object-detection', dict(name=name), detector
    for export in (export_onnx, export_program):
        with pytest.raises(ExportError, match=f'whole of {name}.*depends on the picture'): export(bundle)
    with pytest.raises(ExportError, match=f'{name} must be a graph.*line [0-9]+ of .*it asks for the value of a tensor'):
        capture(detector.eval(), torch.rand(2, 1, 64, 64), name=name)


@pytest.mark.parametrize('precision', ['float32', 'float16'])
@pytest.mark.parametrize('name', ['lenet', 'unet_mini'])
def test_the_public_way(name, precision):
    "Bundle, file, runner and words, as a user meets them."
    bundle = make_bundle(name)
    content = export_onnx(bundle, precision=precision)
    check_export(bundle, content, precision=precision, generator=torch.Generator().manual_seed(2))
    runner = OnnxRunner(content)
    assert (runner.labels, runner.size, runner.n_channels, runner.task) == (
        bundle.labels, bundle.preprocess.size, 3, bundle.task)
    pictures = example_pictures(bundle, 3, torch.Generator().manual_seed(3)).numpy()
    said, here = answer(runner(pictures), runner.labels), bundle.predict(pictures)
    for ours, theirs in zip(said, here):
        if name == 'unet_mini': assert ours['shares'] == pytest.approx(theirs.shares, abs=0.01)
        elif precision == 'float32': assert ours['probabilities'] == pytest.approx(theirs.probabilities, abs=1e-5)


def test_exporting_changes_nothing():
    "The bundle's own model keeps its weights, precision and mode."
    bundle = make_bundle('resnet-mini')
    before = {k: v.clone() for k, v in bundle.model.state_dict().items()}
    export_onnx(bundle, precision='float16')
    for k, v in bundle.model.state_dict().items(): assert torch.equal(v, before[k])
    assert not bundle.model.training


def test_a_graph_of_another_model_is_noticed():
    "Other weights, another precision, a forgotten normalization."
    bundle, other = make_bundle('lenet'), make_bundle('lenet')
    shake(other.model, torch.randn(7, 3, 28, 28), seed=1)
    content = export_onnx(bundle)
    with pytest.raises(ExportError, match='must equal the model to 1e-05'): check_export(other, content)
    with pytest.raises(ExportError, match='must equal'): check_export(bundle, export_onnx(bundle, precision='float16'))
    with pytest.raises(ValueError, match="got 'int4'"): export_onnx(bundle, precision='int4')


def test_a_missing_extra_is_named(monkeypatch):
    "One sentence that says what to install."
    bundle = make_bundle('lenet')
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError, match=r"pip install 'dlfund\[deploy\]'"): export_onnx(bundle)


class Payload:
    "Makes a folder while it is unpickled."
    def __init__(self, place): self.place = str(place)
    def __reduce__(self): return os.mkdir, (self.place,)


def poisoned(archive, payload, where):
    "A `.pt2` archive, with a pickle for one of its members."
    file, evil = io.BytesIO(), io.BytesIO()
    torch.save(payload, evil)
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(file, 'w') as new:
        for m in old.infolist(): new.writestr(m.filename, evil.getvalue() if where in m.filename else old.read(m))
    return file.getvalue()


def test_a_program_is_opened_for_a_signature_only(tmp_path):
    "A `.pt2` can run code, so that without the right signature PyTorch does not see it."
    bundle, canary = make_bundle('lenet'), tmp_path/'was-here'
    program = export_program(bundle)
    place, (private, public) = bundle.save(tmp_path/'bundle'), make_keys(tmp_path/'keys')
    _, stranger = make_keys(tmp_path/'others')
    attach(place, {'model.pt2': program})
    with pytest.raises(BundleError, match='got no signature'): open_program(place, public)
    sign_bundle(place, private)
    batch = example_pictures(bundle, 7)
    assert_close(open_program(place, public)(batch), Servable(bundle)(batch))
    with pytest.raises(BundleError, match='signed by this key'): open_program(place, stranger)
    with pytest.raises(ValueError, match='got None'): open_program(place, None)
    evil = poisoned(program, Payload(canary), 'sample_inputs')
    (place/'model.pt2').write_bytes(evil) # the list of hashes still says the old one
    with pytest.raises(BundleError, match='hash mismatch'): open_program(place, public)
    (place/'model.pt2').write_bytes(program)
    attach(place, {'model.pt2': evil})
    with pytest.raises(BundleError, match='got no signature'): open_program(place, public)
    Bundle.load(place) # opens the weights, not the program
    assert not canary.exists()
    with pytest.raises(Exception): torch.export.load(io.BytesIO(evil)) # noqa: B017 (whatever it raises)
    assert canary.exists(), 'torch.export.load has become safer: the page may say so'
