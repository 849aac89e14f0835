"Mixed precision where a notebook cannot look: processors that lack instructions, a resumed float16 run, a GPU if there is one."
import subprocess, sys
from functools import partial

import pytest
import torch
from conftest import environment
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn
import fastai.callback.progress # adds no_bar

from dlfund.training.precision import MODES, Precision, supported

PROGRAM = "from dlfund.training.precision import supported; print(*supported('cpu'))"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU on this machine')


class Emulated(Precision):
    "Accepts arithmetic that the hardware does not have."
    def check_device(self, device): "Accept every device."


def train(precision, device='cpu', n_steps=12, opt=torch.optim.AdamW, **kwargs):
    "Train a small network on random data; return the Learner and the hidden types."
    torch.manual_seed(0)
    device, seen = torch.device(device), set()
    model = nn.Sequential(nn.Linear(13, 31), nn.ReLU(), nn.Linear(31, 3)).to(device)
    batches = [(torch.randn(17, 13, device=device), torch.randint(0, 3, (17,), device=device)) for _ in range(n_steps)]
    model[0].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    learn = Learner(DataLoaders(batches, batches[:1], device=device), model, nn.CrossEntropyLoss(), cbs=precision,
                    opt_func=partial(OptimWrapper, opt=opt, **kwargs))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01)
    return learn, seen


def test_a_processor_without_bfloat16_is_not_trusted():
    "oneDNN is told that the processor is an older one: it has no bfloat16, and none is offered."
    ran = subprocess.run([sys.executable, '-c', PROGRAM], env=environment(ONEDNN_MAX_CPU_ISA='AVX2'),
                         capture_output=True, text=True)
    if getattr(torch.cpu, 'get_capabilities', dict)().get('architecture') != 'x86_64': pytest.skip('the switch is one of x86')
    assert ran.stdout.split() == ['fp32'], ran


def test_emulation_is_not_support(monkeypatch):
    "AVX-512 without its bfloat16 instructions: oneDNN says yes, we say no."
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(architecture='x86_64', avx512_bf16=False),
                        raising=False)
    assert supported('cpu') == ('fp32',)
    with pytest.raises(ValueError, match="train.precision='bf16' needs hardware with bfloat16, got cpu: use 'fp32'"):
        train(Precision())


@pytest.mark.parametrize('kwargs', [{}, dict(fused=True)])
def test_a_fused_optimizer_skips_and_steps_alike(kwargs):
    "GradScaler treats fused optimizers in another way; skipped steps and weights must not differ."
    learn, seen = train(precision := Emulated('fp16', init_scale=2.0**40), **kwargs)
    assert seen == {torch.float16} and 0 < precision.skipped < 40
    assert all(p.isfinite().all() for p in learn.model.parameters())
    if kwargs: assert precision.skipped == train(Emulated('fp16', init_scale=2.0**40))[0].emulated.skipped


def test_a_checkpoint_keeps_the_scaler():
    "The state of the callback, as a checkpoint stores it, brings the scale back."
    from dlfund.training.checkpoints import attributes, set_attributes
    train(old := Emulated('fp16', init_scale=2.0**30))
    train(new := Emulated('fp16', init_scale=2.0**10))
    set_attributes(new, attributes(old))
    assert new.scaler.state_dict() == old.scaler.state_dict() and new.skipped == old.skipped


@needs_gpu
@pytest.mark.parametrize('mode', ['fp32', 'bf16', 'fp16'])
def test_gpu(mode):
    "Hidden activations have the type, the loss is near that of float32."
    if mode not in supported('cuda'): pytest.skip(f'this GPU has no {mode}')
    learn, seen = train(Precision(mode), 'cuda')
    assert seen == {MODES[mode]}
    assert abs(learn.recorder.values[-1][0] / train(Precision('fp32'), 'cuda')[0].recorder.values[-1][0] - 1) < 0.02
