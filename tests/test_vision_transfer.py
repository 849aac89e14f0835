"The weights inside the package: whole, small, a bundle like any other, and what the record of their making says."
import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dlfund.deployment.bundle import Bundle
from dlfund.vision import MODELS, build
from dlfund.vision.transfer import (adapt_channels, freeze, last_linear, layers_by_depth, load_torchvision, new_head, param_groups, pretrained,
                                    split_by_depth)

ROOT, HOME = Path(__file__).resolve().parent.parent, Path(str(files('dlfund.vision')/'pretrained'))
NAMES = sorted(place.name for place in HOME.iterdir())


@pytest.mark.parametrize('name', NAMES)
def test_weights_are_a_bundle(name):
    lent, bundle = pretrained(name), Bundle.load(HOME/name)
    pictures = torch.randint(256, (5, *lent.preprocess.size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert bundle.preprocess == lent.preprocess
    with torch.no_grad(): assert_close(bundle.logits(pictures), lent.model(lent.preprocess(pictures)), rtol=1e-4, atol=1e-4)


def test_weights_are_small(): assert sum(f.stat().st_size for f in HOME.rglob('*') if f.is_file()) < 1_000_000


def test_the_record_is_of_these_weights():
    record = json.loads((ROOT/'benchmarks'/'results'/'vision_pretrain.json').read_text())
    facts = pretrained().facts
    assert record['data'] == facts['data']['sha256'] and record['results'] == facts['metrics'] and facts['data']['n_test_reads'] == 1


@pytest.mark.parametrize('name', MODELS)
def test_every_network_can_be_tuned(name):
    with torch.device('meta'):
        channels = 1 if name == 'lenet' else 3
        net = new_head(build(name, 10, channels), 7)
        assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in build(name, 7, channels).state_dict().items()}
        parts = layers_by_depth(net)
        for n_groups in (2, 3, len(parts)):
            groups = split_by_depth(net, n_groups)
            assert all(groups) and [id(p) for group in groups for p in group] == [id(p) for p in net.parameters()]
            assert sum(len(g['params']) for g in param_groups(net, slice(1e-4, 1e-2), n_groups)) == len(list(net.parameters()))
            freeze(net, n_groups - 1, n_groups)
            head = set(last_linear(net)[1].parameters())
            assert head <= {p for p in net.parameters() if p.requires_grad}
        wider = adapt_channels(net, 5)
        assert next(m for m in wider.modules() if isinstance(m, nn.Conv2d)).in_channels == 5


def test_freeze_survives_every_mode():
    net = freeze(pretrained().model.train(), 2)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms]
    for change in (nn.Module.train, nn.Module.eval, lambda m: m.eval().train()):
        change(net)(torch.randn(3, 3, 28, 28))
        for m, mean in zip(norms, before): assert torch.equal(m.running_mean, mean)
    freeze(net.train(), 0)(torch.randn(3, 3, 28, 28))
    assert all(not torch.equal(m.running_mean, mean) for m, mean in zip(norms, before))
    assert all(len(m._forward_pre_hooks) == 1 for m in norms) # asked for twice, registered once


def test_state_dict_in_float16():
    theirs = build('resnet18', 7)
    got = load_torchvision('resnet18', {k: v.half() if v.is_floating_point() else v for k, v in theirs.state_dict().items()})
    assert got.preprocess is None and all(p.dtype == torch.float32 for p in got.model.parameters())
