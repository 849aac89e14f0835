"The callbacks of the loop, in what a page cannot show: stopped in the middle of an epoch and resumed, copied, and sent to another process."
import copy, pickle
from contextlib import suppress
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastcore.basics import noop
from torch import nn
from torch.testing import assert_close

from dlfund.training.checkpoints import CheckpointCallback
from dlfund.training.learner import (AccumulateCallback, ClipCallback, DivergedError, EMACallback, EpochLogCallback, GradNormCallback,
                                     QuickLearner, StopOnNaN, first_not_finite)
from dlfund.training.precision import Precision

torch.manual_seed(0)
BATCHES = [(torch.randn(n, 7), torch.randint(0, 3, (n,))) for n in (11, 11, 11, 11, 11, 11, 5)]


class Batches(list):
    "A loader without an order of its own, but with a generator, as `CheckpointCallback` expects."
    class rng:
        @staticmethod
        def getstate(): return None
        @staticmethod
        def setstate(state): pass


class StopAfter(Callback):
    "Press Ctrl-C after a step."
    order = 2000
    def __init__(self, step): self._step = step
    def after_batch(self):
        if self.training and self.train_iter == self._step: raise KeyboardInterrupt


def fresh(engine, *cbs):
    "A learner as a new process would make it."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 13), nn.BatchNorm1d(13), nn.ReLU(), nn.Dropout(0.2), nn.Linear(13, 3))
    cbs = [AccumulateCallback(3), ClipCallback(norm=0.5), EMACallback(0.8), GradNormCallback(), StopOnNaN(), EpochLogCallback(noop), *cbs]
    learn = engine(DataLoaders(Batches(BATCHES), Batches(BATCHES[:2]), device='cpu'), net, nn.CrossEntropyLoss(), cbs=cbs,
                   opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    learn.logger = noop
    return learn.remove_cb(ProgressCallback)


def facts(learn):
    "All that must be the same."
    history = [{k: v for k, v in row.items() if k != 'seconds'} for row in learn.epoch_log.history]
    return dict(weights=learn.model.state_dict(), live=learn.ema.live, history=history, norms=learn.grad_norm.norms,
                losses=[float(loss) for loss in learn.recorder.losses])


@pytest.mark.parametrize('engine', [Learner, QuickLearner])
def test_stopped_while_gradients_accumulate(engine, tmp_path):
    whole = fresh(engine)
    whole.fit_one_cycle(3, 0.01, cbs=CheckpointCallback(tmp_path/'whole', steps=1))
    for step in (1, 2, 3, 7, 8, 13, 20):
        stopped = fresh(engine, StopAfter(step))
        checkpoint = CheckpointCallback(tmp_path/str(step), steps=1)
        with suppress(KeyboardInterrupt): stopped.fit_one_cycle(3, 0.01, cbs=checkpoint)
        checkpoint.flush()
        resumed = fresh(engine)
        resumed.fit_one_cycle(3, 0.01, cbs=CheckpointCallback(tmp_path/str(step), steps=1, resume=True))
        assert_close(facts(resumed), facts(whole), rtol=0, atol=0, msg=lambda m: f'stopped after step {step}: {m}')


def test_a_quick_learner_is_copied_and_pickled_in_the_middle_of_its_life():
    learn = fresh(QuickLearner)
    learn.fit(1, 0.01)
    for twin in (copy.deepcopy(learn.model), pickle.loads(pickle.dumps(learn)).model):
        assert_close(twin.state_dict(), learn.model.state_dict(), rtol=0, atol=0)
    again = pickle.loads(pickle.dumps(learn))
    for each in (learn, again):
        torch.manual_seed(1)
        each.fit(1, 0.01)
    assert_close(again.model.state_dict(), learn.model.state_dict(), rtol=0, atol=0)


def test_a_mid_fit_evaluation_leaves_the_training_alone():
    "`validate` inside an epoch swaps the averages in; the next training batch must have the weights of training again."
    class LookCallback(Callback):
        order = 70
        def after_batch(self):
            if self.training and self.iter == 3:
                dl, n_iter = self.dl, self.n_iter
                with self.learn.validation_context(inner=True): self.learn._do_epoch_validate()
                self.model.train()
                self.learn.training, self.learn.dl, self.learn.n_iter = True, dl, n_iter
    looked, plain = fresh(QuickLearner, LookCallback()), fresh(QuickLearner)
    for each in (looked, plain): each.remove_cbs([each.epoch_log, each.recorder])
    for each in (looked, plain):
        for module in each.model.modules():
            if isinstance(module, nn.Dropout): module.p = 0.0
        each.fit(2, 0.01)
    assert_close(looked.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)


class Half(Precision):
    "float16 on a processor that has no such instructions."
    def check_device(self, device): "Accept every device."


@pytest.mark.parametrize('engine', [Learner, QuickLearner])
@pytest.mark.parametrize('mode, width', [('fp16', 1e5), ('bf16', 3.4e38)])
def test_an_overflow_of_sixteen_bits_is_found_where_it_happens(engine, mode, width):
    "What float32 holds and the 16-bit type does not: the second run has to be in `autocast` as the first was."
    net = nn.Sequential(nn.Linear(7, 13), nn.Linear(13, 11), nn.ReLU(), nn.Linear(11, 3))
    with torch.no_grad():
        for p in net.parameters(): p.zero_()
        net[1].bias.fill_(width)
    batches = BATCHES[:2]
    learn = engine(DataLoaders(batches, batches, device='cpu'), net, nn.CrossEntropyLoss(), cbs=[StopOnNaN(), Half(mode)])
    learn.logger = noop
    learn.remove_cb(ProgressCallback)
    with pytest.raises(DivergedError, match=r'no step was taken yet; .*: the output of 1 \(Linear\)$'): learn.fit(1, 0.01)
    assert first_not_finite(net, *([part] for part in batches[0])) == 'the loss itself: every layer was finite'
