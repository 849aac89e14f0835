"""The fast recipe of `dlfund.vision.recipe` against ResNet-18 for the same minutes; its ablation.

race:     trains on train and valid together, for --minutes with everything included; reads test once a run;
          stores vision_recipe_race_DATA.json (by default CIFAR-10, three seeds, both recipes: 90 minutes)
budgets:  shorter races on the validation part, --epochs 2 5 10; stores vision_recipe_budgets_DATA.json
ablation: one ingredient off at a time, on the validation part, with --pictures of the training part; stores vision_recipe_ablation_DATA.json
try:      one run on the validation part with other settings (--set lr=0.15 n_epochs=8); nothing is stored

CIFAR-10 needs DLFUND_DATA. For full speed set GLIBC_TUNABLES=glibc.malloc.hugetlb=1 and OMP_WAIT_POLICY=PASSIVE, and
let nothing else run on the machine.
"""
import argparse, ast, ctypes, json, time
from dataclasses import asdict, replace

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from common import RESULTS, spread, store
from dlfund.data.datasets import load
from dlfund.vision.recipe import (FromBytes, RecipeConfig, fit_recipe, predict_views, recipe_batches, recipe_model,
                                  recipe_optimizers)

RECIPES = { # chosen on the validation part; a race replaces `n_epochs` by what its minutes hold
    'cifar10': RecipeConfig(n_epochs=20, sides=((0, 24), (0.4, 28), (0.7, 32)), lr=0.12),
    'fashion-mnist': RecipeConfig(n_epochs=20, sides=((0, 22), (0.5, 28)), whiten=3, lr=0.12)}
ABLATION = {'all of it': {}, 'a trained stem': dict(whiten=0), 'SGD for the filters': dict(optimizer='sgd', lr=0.05),
            'AdamW for the filters': dict(optimizer='adamw', lr=0.003), 'coins for flips': dict(flip='random'),
            'no flips': dict(flip='none'), 'no smoothing': dict(smoothing=0.0), 'full size from the start': None,
            'no sheets': dict(use_sheets=False), 'channels first': dict(use_channels_last=False, use_sheets=False),
            'float32': dict(use_bf16=False)}


def keep_memory():
    "Tell glibc to keep freed memory: large maps else come from the system, page by page, at every step."
    try: libc = ctypes.CDLL('libc.so.6')
    except OSError: return # not Linux
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)): libc.mallopt(option, value)


def tensors(data, judge):
    "Pictures and classes to train on and to judge with, bytes `(n, h, w, c)`."
    parts = [(data.train.x, data.train.y), (data.valid.x, data.valid.y)]
    train = parts[:1] if judge == 'valid' else parts
    x, y = (torch.from_numpy(np.concatenate(values)) for values in zip(*train))
    judged = data.valid if judge == 'valid' else data.test
    found = [x, y.long(), torch.from_numpy(judged.x), torch.from_numpy(judged.y).long()]
    return [t[..., None] if t.ndim == 3 else t for t in found]


def accuracy(model, x, y, many, config):
    "Share of right answers with one view or with six."
    logits = predict_views(model, x, flip=many and config.flip != 'none', shift=int(many), use_bf16=config.use_bf16)
    return float((logits.argmax(1) == y).float().mean())


def train_recipe(x, y, config, seed, n_classes):
    "The fast recipe."
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, begin = recipe_model(x, n_classes, config, generator), time.perf_counter()
    def log(epoch, loss):
        print(f'  epoch {epoch}/{config.n_epochs}, loss {loss:.3f}, {time.perf_counter() - begin:.0f} s', flush=True)
    fit_recipe(model, recipe_optimizers(model, config), x, y, config, generator=generator, log=log)
    return model, config.n_epochs


def epochs_that_fit(x, y, config, seconds, n_classes):
    "How many epochs of the fast recipe the seconds hold, by a few steps at each of its sides."
    begin, cost = time.perf_counter(), 0.0
    ends = [share for share, _ in config.sides[1:]] + [1.0]
    for (share, side), end in zip(config.sides, ends):
        short, picks = replace(config, n_epochs=1, sides=((0, side),)), torch.randperm(len(x))[:8*config.bs]
        model = recipe_model(x, n_classes, short)
        optimizers = recipe_optimizers(model, short)
        fit_recipe(model, optimizers, x[picks[:2*config.bs]], y[picks[:2*config.bs]], short) # to warm up
        step_begin = time.perf_counter()
        fit_recipe(model, optimizers, x[picks], y[picks], short)
        cost += (end - share) * (time.perf_counter() - step_begin)/8 * (len(x)//config.bs)
    n_epochs = max(1, int((seconds - (time.perf_counter() - begin)) / (1.03*cost))) # 3 % in hand
    print(f'{cost:.1f} s an epoch: {n_epochs} epochs fit into {seconds:.0f} s', flush=True)
    return n_epochs


def standard_step(model, opt, xb, yb, config):
    "One step of the standard recipe."
    with torch.autocast('cpu', torch.bfloat16, enabled=config.use_bf16): logits = model(xb)
    loss = F.cross_entropy(logits.float(), yb)
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.item()


def train_standard(x, y, config, seed, n_classes, seconds):
    "torchvision's ResNet-18 with a 3×3 stem: SGD, one cycle, crops and coin flips, as many steps as the seconds hold."
    torch.manual_seed(seed)
    generator, begin = torch.Generator().manual_seed(seed), time.perf_counter()
    net = torchvision.models.resnet18(num_classes=n_classes)
    net.conv1, net.maxpool = nn.Conv2d(x.shape[-1], 64, 3, padding=1, bias=False), nn.Identity()
    model = nn.Sequential(FromBytes(x), net.to(memory_format=torch.channels_last)).train()
    opt = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=5e-4)
    took = []
    for picks in torch.randperm(len(x), generator=generator)[:8*config.bs].split(config.bs):
        step_begin = time.perf_counter() # eight steps to measure; their learning rate is next to nothing
        standard_step(model, opt, x[picks], y[picks], config)
        took.append(time.perf_counter() - step_begin)
    left = seconds - (time.perf_counter() - begin)
    n_steps, step, epoch = max(20, int(left / (1.04*np.median(took)))), 0, 0 # 4 % for the batches themselves
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=n_steps, pct_start=0.25)
    config = replace(config, n_epochs=1 + n_steps*config.bs//len(x))
    while step < n_steps:
        for xb, yb in recipe_batches(x, y, config, epoch, torch.zeros(len(x), dtype=torch.bool), generator=generator):
            if step == n_steps or time.perf_counter() - begin > 1.05*seconds: break
            loss = standard_step(model, opt, xb, yb, config)
            schedule.step(); step += 1
        else:
            epoch += 1
            print(f'  epoch {epoch}, loss {loss:.3f}, {time.perf_counter() - begin:.0f} s', flush=True)
            continue
        break # out of steps or out of time
    return model, step*config.bs/len(x)


def one_run(parts, config, seed, n_classes, standard_seconds=None, extra=(0.0, 0.0)):
    "Train, judge with one view and with six; wall and processor seconds, with what loading took (`extra`) in them."
    x, y, judge_x, judge_y = parts
    wall, cpu = time.perf_counter() - extra[0], time.process_time() - extra[1]
    if standard_seconds is None: model, epochs = train_recipe(x, y, config, seed, n_classes)
    else:
        config = RecipeConfig(bs=128, shift=4, flip='random', sides=((0, x.shape[1]),), use_bf16=config.use_bf16)
        model, epochs = train_standard(x, y, config, seed, n_classes, standard_seconds)
    train_seconds = time.perf_counter() - wall
    one, many = (accuracy(model, judge_x, judge_y, views, config) for views in (False, True))
    row = dict(recipe='fast' if standard_seconds is None else 'standard', seed=seed, epochs=epochs,
               threads=torch.get_num_threads(), accuracy=one,
               accuracy_views=many, train_seconds=train_seconds, seconds=time.perf_counter() - wall,
               cpu_seconds=time.process_time() - cpu,
               config=asdict(config) if standard_seconds is None else 'ResNet-18')
    print(f"{row['recipe']}, seed {seed}: {epochs:.1f} epochs, one view {one:.4f}, six {many:.4f}, "
          f"{row['seconds']:.0f} s ({row['cpu_seconds']:.0f} s of processor)", flush=True)
    return row


def loaded(name, judge):
    "The data and the seconds that loading took."
    wall, cpu = time.perf_counter(), time.process_time()
    data = load(name)
    parts = tensors(data, judge)
    return data, parts, (time.perf_counter() - wall, time.process_time() - cpu)


def keep(part, args, data, rows, **facts):
    "Store rows next to those of other calls with the same data, or in place of the same runs; `--fresh` begins anew."
    name = f'vision_recipe_{part}_{args.data}'
    file = RESULTS/f'{name}.json'
    old = json.loads(file.read_text())['results'] if file.exists() and not args.fresh else []
    key = lambda row: (row['recipe'], row['seed'], row.get('without'), row['config'] if 'without' not in row else None)
    old = [row for row in old if key(row) not in map(key, rows)] # a repeated run takes the place of its first
    print(store(name, old + rows, data=data.sha256, **facts))
    args.fresh = False


def race(args):
    "Both recipes for the same minutes, loading and judging included, judged on test."
    data, parts, extra = loaded(args.data, 'test')
    x, y, n_classes = *parts[:2], len(data.labels)
    config, minutes = replace(RECIPES[args.data], **args.set), args.minutes or 15
    seconds = 60*minutes - extra[0] - 50 # 50 s for judging, seven views of 10,000 pictures
    if 'n_epochs' not in args.set:
        config = replace(config, n_epochs=epochs_that_fit(x, y, config, seconds, n_classes))
    for seed in args.seeds:
        if 'fast' in args.recipes:
            keep('race', args, data, [one_run(parts, config, seed, n_classes, None, extra)], judged='test')
        if 'standard' in args.recipes:
            keep('race', args, data, [one_run(parts, config, seed, n_classes, seconds, extra)], judged='test')


def budgets(args):
    "Shorter races, judged on valid: the fast recipe for some epochs, then the standard one for as many seconds."
    data, parts, extra = loaded(args.data, 'valid')
    for n_epochs in args.epochs:
        config = replace(RECIPES[args.data], n_epochs=n_epochs, **args.set)
        for seed in args.seeds:
            rows = [one_run(parts, config, seed, len(data.labels))] if 'fast' in args.recipes else []
            seconds = rows[0]['train_seconds'] if rows else 60*(args.minutes or 2)
            if 'standard' in args.recipes: rows.append(one_run(parts, config, seed, len(data.labels), seconds))
            keep('budgets', args, data, rows, judged='valid')


def ablation(args):
    "One ingredient off at a time."
    data, parts, extra = loaded(args.data, 'valid')
    if args.pictures: parts[:2] = (part[::len(part)//args.pictures] for part in parts[:2]) # they lie class by class
    base = replace(RECIPES[args.data], n_epochs=args.epochs[0], **args.set)
    for seed in args.seeds:
        for name in args.only or ABLATION:
            change = ABLATION[name] if ABLATION[name] is not None else dict(sides=((0, parts[0].shape[1]),))
            row = one_run(parts, replace(base, **change), seed, len(data.labels))
            keep('ablation', args, data, [row | dict(without=name, n_pictures=len(parts[0]))], judged='valid')


def attempt(args):
    "One run on valid, nothing stored."
    data, parts, extra = loaded(args.data, 'valid')
    config = replace(RECIPES[args.data], **args.set)
    for seed in args.seeds:
        if 'fast' in args.recipes: one_run(parts, config, seed, len(data.labels), None, extra)
        if 'standard' in args.recipes: one_run(parts, config, seed, len(data.labels), 60*(args.minutes or 2), extra)


def setting(text):
    "`name=value` as a pair, the value in Python's notation."
    name, value = text.split('=', 1)
    try: return name, ast.literal_eval(value)
    except (ValueError, SyntaxError): return name, value


def main(argv=None):
    "Run the parts that were asked for."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', nargs='?', default='race', choices=['race', 'budgets', 'ablation', 'try'])
    parser.add_argument('--data', default='cifar10', choices=[*RECIPES])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--recipes', nargs='+', default=['fast', 'standard'], choices=['fast', 'standard'])
    parser.add_argument('--epochs', type=int, nargs='+', default=[4], help='for budgets (several) and ablation')
    parser.add_argument('--minutes', type=float, help='of a race, all included (15), or of the standard recipe')
    parser.add_argument('--only', nargs='+', choices=[*ABLATION], help='rows of the ablation')
    parser.add_argument('--pictures', type=int, help='that the ablation trains on, about; all by default')
    parser.add_argument('--set', type=setting, nargs='+', default=[], metavar='NAME=VALUE', help='change the recipe')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--fresh', action='store_true', help='forget what is stored')
    args = parser.parse_args(argv)
    args.set = dict(args.set)
    keep_memory()
    torch.set_num_threads(args.threads)
    dict(race=race, budgets=budgets, ablation=ablation).get(args.part, attempt)(args)


if __name__ == '__main__': main()
