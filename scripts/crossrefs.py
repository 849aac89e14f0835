"What Quarto does to a page and smalldocs does not: numbers, captions, cross references, citations, MathML."
import re
from collections.abc import Callable

from bs4 import BeautifulSoup, NavigableString, Tag
from latex2mathml.converter import convert
from pybtex.database import BibliographyData
from pybtex.plugin import find_plugin

KINDS = dict(fig='Figure', tbl='Table', eq='Equation', exr='Exercise', sec='Section')
LABEL = r'(?:fig|tbl|eq|exr|sec)-[\w-]*\w'
KEY = r'[a-z][a-z-]*\d{4}\w*'
REFERENCE = re.compile(rf'\[@({LABEL})\]|@({LABEL})')
GROUP = re.compile(rf'\[([^\[\]]*@{KEY}[^\[\]]*)\]|(?<![\w.])@({KEY})')
EQUATION = re.compile(r'^\$\$((?:(?!\$\$).)+)\$\$ *\{#(eq-[\w-]+)\}[ ]*$', re.M|re.S)
FENCED = re.compile(r'^ *(`{3,}|~{3,}).*?^ *\1`* *$', re.M|re.S)
DIALECT = [(r'\{aligned\}', '{split}'), (r'\\operatorname\*', r'\\operatorname'),
           (r'\\arg *\\(min|max)|\\operatorname\{arg\\,(min|max)\}', r'\\operatorname{arg\1\2}')]
LIMITS = (r'\\(max|min|lim|sup|inf|operatorname\{arg\w+\})_', r'\\\1\\limits_')
FUNCTION = '<mi>(?:log|ln|exp|sin|cos|tan|sinh|cosh|tanh|arctan|det|dim|sgn|erf)</mi>'
NO_PROSE = ['a', 'code', 'pre', 'script', 'style', 'math', 'svg']


def number_equations(
    text:str, # Markdown of a page
)->str: # the same, each `$$ ... $$ {#eq-x}` in a div with that id and the number at its end, as Quarto writes it
    "Number the labelled equations outside code."
    count = iter(range(1, len(text)))
    def div(m): return f'\n::: {{#{m[2]} .equation}}\n$$\n{m[1].strip()} \\qquad({next(count)})\n$$\n:::\n'
    out, end = [], 0
    for code in FENCED.finditer(text):
        out += [EQUATION.sub(div, text[end:code.start()]), code[0]]
        end = code.end()
    return ''.join(out) + EQUATION.sub(div, text[end:])


def mathml(
    tex:str, # LaTeX without delimiters
    display:bool, # on a line of its own
)->str: # a `<math>` element
    "Translate mathematics; what latex2mathml does not know is an error, not a blank."
    for ours, theirs in DIALECT + [LIMITS]*display: tex = re.sub(ours, theirs, tex)
    out = convert(tex, display='block' if display else 'inline')
    if re.search(r'>\\|<mi>&</mi>|<mo ?/>', out): raise ValueError(f'the preview cannot typeset ${tex}$')
    thin = '<mspace width="0.17em"/>' # which latex2mathml forgets around the name of a function
    out = re.sub(f'({FUNCTION})(?=<m(?!o))', rf'\1{thin}', out)
    out = re.sub(f'(</m(?:i|n|su[bp]|subsup|frac|row|sqrt)>)(?={FUNCTION})', rf'\1{thin}', out)
    return out.replace('<mi>&#x0007E;</mi>', '<mo>&#x223C;</mo>')


def caption(
    box:Tag, # the figure or table, with all that belongs to it
    label:str, # such as `fig-x`
    text:str, # HTML of the caption, with its number
):
    "Give a figure (below) or a table (above) the caption `text`, in place of the one it had."
    for old in box.find_all(['figcaption', 'caption']): old.decompose()
    new = BeautifulSoup(f'<figcaption id="{label}-caption">{text}</figcaption>', 'html.parser').figcaption
    if label.startswith('tbl'): (box.find(class_='cell-output') or box.find(class_='sd-table')).insert_before(new)
    else: (box.find('figure') or box).append(new)


class Labels:
    "The labels of one page, numbered in order, each with what a reference to it says."
    def __init__(self,
        soup:BeautifulSoup, # the page's body
        captions:dict, # label: caption, as Markdown, of the code cells that have one
        inline:Callable, # Markdown on one line -> HTML
    ):
        self.numbers = {}
        tags = [tag for tag in soup.find_all(id=re.compile(f'^{LABEL}$')) if tag.name != 'figcaption']
        for tag in tags: self.number(tag)
        for tag in tags:
            if tag['id'].startswith(('fig', 'tbl')): self.caption(tag, captions, inline)
            if tag['id'].startswith('exr'): self.exercise(tag)

    def number(self,
        tag:Tag, # an element with a label
    ):
        "Count the element among its kind; a section has the number of its heading."
        kind = tag['id'].split('-')[0]
        section = tag.find(class_='header-section-number')
        if kind == 'sec' and not section: raise ValueError(f'{tag["id"]} is not on a heading of level 2')
        if tag['id'] in self.numbers: raise ValueError(f'the label {tag["id"]} is used twice')
        same = sum(label.startswith(kind + '-') for label in self.numbers)
        self.numbers[tag['id']] = section.get_text().strip() if kind == 'sec' else str(same + 1)

    def caption(self,
        tag:Tag, # a labelled figure or table; a picture in Markdown carries its label on the `img`
        captions:dict, # as in `__init__`
        inline:Callable, # as in `__init__`
    ):
        "Write `Figure N: ...` under a figure, `Table N: ...` over a table."
        label, box = tag['id'], (tag.find_parent(class_='quarto-figure') if tag.name == 'img' else tag)
        if box is None: raise ValueError(f'{label} has no caption')
        old = box.find(['figcaption', 'caption'])
        text = inline(captions[label]) if label in captions else old and old.decode_contents().strip()
        if not text: raise ValueError(f'{label} has no caption')
        caption(box, label, f'{self.text(label)}: {text}')

    def exercise(self,
        tag:Tag, # the div of an exercise
    ):
        "Open an exercise with its name and number."
        tag['class'] = ['theorem', 'exercise']
        title = f'<span class="theorem-title"><strong>{self.text(tag["id"])}</strong></span> '
        (tag.find('p') or tag).insert(0, BeautifulSoup(title, 'html.parser'))

    def text(self,
        label:str, # such as `fig-x`
    )->str: # such as `Figure 3`
        "Name what a label stands on."
        if label not in self.numbers: raise ValueError(f'@{label} refers to nothing on this page')
        return f"{KINDS[label.split('-')[0]]}\u00a0{self.numbers[label]}"

    def link(self,
        m:re.Match, # of `REFERENCE`
    )->str: # HTML
        "Turn `@fig-x` into a link."
        label = m[1] or m[2]
        return f'<a href="#{label}" class="quarto-xref">{self.text(label)}</a>'


class Citations:
    "The works that one page cites."
    def __init__(self,
        bib:BibliographyData, # every work that can be cited
    ): self.bib, self.cited = bib, {}

    def names(self,
        key:str, # a key of the bibliography
    )->str: # such as `Smith and Topin`
        "Name the authors of a work, as in running text."
        if key not in self.bib.entries: raise ValueError(f'@{key} is not in nbs/references.bib')
        self.cited[key] = self.bib.entries[key]
        names = [' '.join(p.prelast_names + p.last_names).replace('{', '').replace('}', '')
                 for p in self.bib.entries[key].persons['author']]
        if len(names) > 3: return f'{names[0]} et al.'
        *rest, last = names
        return (', '.join(rest) + (', and ' if len(rest) > 1 else ' and ') if rest else '') + last

    def link(self,
        m:re.Match, # of `GROUP`: `[see @a; @b]` or `@a`
    )->str: # HTML, author and year in Chicago's way
        "Turn a citation into links to the list of references."
        def one(key, form):
            text = form.format(self.names(key), self.bib.entries[key].fields['year'])
            return f'<a href="#ref-{key}">{text}</a>'
        if m[2]: return one(m[2], '{} ({})')
        return '(' + re.sub(f'@({KEY})', lambda k: one(k[1], '{} {}'), m[1]) + ')'

    def references(self)->str: # HTML of the list; empty when the page cites nothing
        "List the cited works at the end of the page, by author and year."
        if not self.cited: return ''
        style = find_plugin('pybtex.style.formatting', 'plain')(sorting_style='author_year_title')
        html = find_plugin('pybtex.backends', 'html')()
        works = style.format_bibliography(self.bib, list(self.cited))
        rows = ''.join(f'<div id="ref-{w.key}" class="csl-entry">{w.text.render(html)}</div>' for w in works)
        return f'<section id="references" class="level2"><h2>References</h2><div id="refs">{rows}</div></section>'


def typeset(
    html:str, # body of a page, as smalldocs wrote it
    captions:dict, # label: caption of the code cells
    inline:Callable, # Markdown on one line -> HTML
    bib:BibliographyData, # the works that can be cited
)->tuple[str, Callable]: # the finished body, and a function that resolves references in plain text (for search)
    "Number, caption, cross-refer, cite and typeset one page."
    soup = BeautifulSoup(html, 'html.parser')
    labels, cites = Labels(soup, captions, inline), Citations(bib)
    def resolve(text): return GROUP.sub(cites.link, REFERENCE.sub(labels.link, text))
    for span in soup.select('span.math'):
        span.replace_with(BeautifulSoup(mathml(span.get_text()[2:-2], 'display' in span['class']), 'html.parser'))
    for node in soup.find_all(string=re.compile('@')):
        if type(node) is NavigableString and not node.find_parent(NO_PROSE):
            node.replace_with(BeautifulSoup(resolve(node.output_ready(formatter='minimal')), 'html.parser'))
    soup.append(BeautifulSoup(cites.references(), 'html.parser'))
    def searchable(text): # which holds code too, where `@x` may be anything; the prose was resolved above
        try: return re.sub('<[^>]+>', '', resolve(text))
        except ValueError: return text
    return str(soup), searchable
