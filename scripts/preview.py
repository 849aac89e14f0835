#!/usr/bin/env python
"""Build the site without Quarto, at the addresses that nbdev and Quarto give: preview.py [--check] [--serve PORT]

nbdev processes the notebooks as for Quarto, smalldocs reads the same `_quarto.yml`, and `crossrefs.py` adds what
smalldocs lacks. The site is in `_docs/`, the folder of `nbdev_docs`.
"""
import argparse, configparser, functools, http.server, json, os, re, shutil, sys
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urljoin, urlparse

from bs4 import BeautifulSoup
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from pybtex.database import parse_file
from smalldocs.config import load
from smalldocs.layout import inline_md
from smalldocs.notebook import cell_options, source
from smalldocs.site import Page, Site

from crossrefs import number_equations, typeset

ROOT = Path(__file__).resolve().parent.parent
NOT_SMALLDOCS = re.compile(r'bibliography|link-cit|html-math|respect-user|grid|output-file|theme\.scss|collapse-level')
WEB = re.compile(r'^(https?:)?//')
OF_REPO = re.compile(r'/(?:blob|edit)/\w+/([^#?]+)')


class Book(Site):
    "smalldocs, with nbdev's addresses and Quarto's cross references."
    def read(self,
        src:PurePosixPath, # a page's source, relative to the root
    )->Page: # the page, at the address in its front matter
        "Read a page; note the captions of its code cells, which smalldocs shows as plain text."
        page = super().read(src)
        page.out = page.out.with_name(page.front.get('output-file', page.out.name))
        page.body = number_equations(page.body)
        cells = json.loads((self.root/src).read_text(encoding='utf-8'))['cells'] if src.suffix == '.ipynb' else []
        opts = [cell_options(source(c))[0] for c in cells if c['cell_type'] == 'code']
        page.meta['captions'] = {o['label']: o.get('fig-cap') or o.get('tbl-cap') for o in opts if 'label' in o}
        return page

    def render_page(self,
        page:Page, # a page that was read
    ):
        "Render a page, then number, cite and typeset it."
        super().render_page(page)
        captions = {k: v for k, v in page.meta['captions'].items() if v}
        try: page.html, plain = typeset(page.html, captions, lambda md: inline_md(md, self, page), self.bib)
        except ValueError as e: return self.faults.append(f'{page.src}: {e}')
        page.env['math'] = False
        for part in page.env['search']: part['text'] = plain(part['text'])

    def build(self)->int: # the number of pages
        "Build the site; what cannot be resolved, on any page, is an error."
        self.faults = []
        n = super().build()
        if self.faults: raise SystemExit('\n'.join(self.faults))
        return n

    @functools.cached_property
    def bib(self): return parse_file(self.root/'references.bib')


def build():
    "Process the notebooks, render them, and put the site in `_docs`."
    os.chdir(ROOT)
    refresh_quarto_yml()
    proc, work = ROOT/'_proc', ROOT/'_preview'
    for old in proc.rglob('*.ipynb'):
        if not (ROOT/'nbs'/old.relative_to(proc)).exists(): old.unlink()
    proc_nbs(n_workers=2)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(proc, work, ignore=shutil.ignore_patterns('_docs'))
    site = Book(load(work))
    site.build()
    for css in site.out.rglob('site_libs/themes/*.css'):
        css.write_text(re.sub(r'@import url\(.*?\);?', '', css.read_text(encoding='utf-8')), encoding='utf-8')
    for warning in site.warnings:
        if not NOT_SMALLDOCS.search(warning): print('warning:', warning, file=sys.stderr)
    shutil.rmtree(ROOT/'_docs', ignore_errors=True)
    shutil.move(site.out, ROOT/'_docs')


@functools.cache
def parse(
    path:Path, # an HTML file
)->BeautifulSoup: # the page
    "Parse a page once."
    return BeautifulSoup(path.read_text(encoding='utf-8'), 'html.parser')


def problem(
    docs:Path, # the built site
    page:Path, # the page that holds the link
    link:str, # a `href` or `src`
    home:str, # address of the published site, ending in `/`
    repo:str, # address of the repository
)->str: # what is wrong; empty when nothing is
    "Follow one link as far as this machine can tell: to a page, an anchor, or a file of the repository."
    url = urlparse(urljoin(home + page.relative_to(docs).as_posix(), link))
    in_repo = OF_REPO.search(url.path)
    if in_repo and (link.startswith(repo) or url.netloc.startswith('colab')):
        return '' if (ROOT/unquote(in_repo[1])).exists() else 'no such file in the repository'
    if not url.geturl().startswith(home): return ''
    target = docs/unquote(url.path).removeprefix(urlparse(home).path)
    if target.is_dir(): target = target/'index.html'
    if not target.is_file(): return 'no such page or file'
    if not url.fragment or target.suffix != '.html': return ''
    return '' if parse(target).find(id=unquote(url.fragment)) else 'no such anchor'


def check(
    docs:Path, # the built site
)->list[str]: # one line for each thing that is wrong
    "Find broken links, requests to other servers, and pictures without a description."
    parse.cache_clear()
    ini = configparser.ConfigParser()
    ini.read(ROOT/'settings.ini')
    home, repo = (ini['DEFAULT'][k] for k in ('doc_host', 'git_url'))
    home += ini['DEFAULT']['doc_baseurl'] + '/'
    found = [f'{f.relative_to(docs)}: asks another server' for f in docs.rglob('*.css')
             if re.search(r'url\([\'"]?(https?:)?//|@import', f.read_text(encoding='utf-8'))]
    for path in docs.rglob('*.html'):
        name, soup = path.relative_to(docs), parse(path)
        for tag in soup.select('[href], [src]'):
            link = tag.get('href') or tag.get('src') or ''
            if tag.name != 'a' and WEB.match(link): found.append(f'{name}: {link}: asks another server')
            if why := problem(docs, path, link, home, repo): found.append(f'{name}: {link}: {why}')
        bare = [img for img in soup.select('main img') if not img.get('alt')]
        found += [f'{name}: a picture has no fig-alt: {str(img)[:80]}' for img in bare]
    entries = json.loads((docs/'search.json').read_text(encoding='utf-8'))
    return found + [f'search.json: {e["href"]}: {why}' for e in entries
                    if (why := problem(docs, docs/'index.html', e['href'], home, repo))]


def serve(
    port:int, # port on this machine
):
    "Serve the built site until interrupted."
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=ROOT/'_docs')
    print(f'http://localhost:{port}')
    try: http.server.ThreadingHTTPServer(('localhost', port), handler).serve_forever()
    except KeyboardInterrupt: pass


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='fail on broken links, requests outside, missing alt text')
    parser.add_argument('--serve', type=int, metavar='PORT', help='serve the site after building it')
    args = parser.parse_args()
    build()
    problems = check(ROOT/'_docs') if args.check else []
    if problems: sys.exit('\n'.join(problems))
    if args.serve: serve(args.serve)
