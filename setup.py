"Everything about the package is said in settings.ini; this file hands it to setuptools."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
extras = {key.removesuffix('_requirements'): cfg[key].split() for key in cfg if key.endswith('_requirements')}
readme = Path('README.md').read_text(encoding='utf-8') if Path('README.md').exists() else cfg['description']
for relative, absolute in {'](README_files/': f"]({cfg['git_url']}/raw/main/README_files/", '](nbs/': f"]({cfg['git_url']}/blob/main/nbs/"}.items():
    readme = readme.replace(relative, absolute) # on PyPI there is no repository around the page

CHAPTERS = ['nbs/**/*.ipynb', 'nbs/references.bib', 'benchmarks/results/*.json'] # what `dlfund book` unpacks


class BuildWithChapters(build_py):
    "Put the chapters beside the code of a wheel; in a clone they are where they are."
    def run(self):
        super().run()
        if self.editable_mode: return
        for path in (p for pattern in CHAPTERS for p in Path().glob(pattern) if '.ipynb_checkpoints' not in p.parts):
            target = Path(self.build_lib)/cfg['lib_name']/'chapters'/path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=readme,
    long_description_content_type='text/markdown', python_requires=f'>={cfg["min_python"]}',
    classifiers=['Intended Audience :: Education', 'Intended Audience :: Science/Research',
                 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    packages=find_packages(include=['dlfund', 'dlfund.*']), package_data={'dlfund.data': ['embedded/*'], 'dlfund.vision': ['pretrained/*/*']},
    install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=[f'{cfg["lib_name"]}={cfg["lib_name"]}._modidx:d']),
    license_files=['LICENSE', 'LICENSE-prose'], zip_safe=False, cmdclass=dict(build_py=BuildWithChapters))
