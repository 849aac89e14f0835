#!/usr/bin/env python
"Print pip constraints with the oldest version that settings.ini allows of each requirement: oldest.py > oldest.txt"
import configparser, re
from pathlib import Path

SETTINGS = Path(__file__).resolve().parent.parent/'settings.ini'


def oldest(
    requirements:str, # such as `torch>=2.6,<3 einops>=0.8,<1`
)->list[str]: # such as `torch==2.6`
    "Turn lower bounds into constraints."
    return [f'{name}=={version}' for name, version in re.findall(r'([\w-]+)>=([\w.]+)', requirements)]


if __name__ == '__main__':
    config = configparser.ConfigParser(delimiters=['='])
    config.read(SETTINGS, encoding='utf-8')
    print('\n'.join(oldest(config['DEFAULT']['requirements'])))
