"Pictures that strangers should not send, all made here: `CORPUS` says for each what a server may answer."
import gzip, io, random, struct, zipfile, zlib

import numpy as np
from PIL import Image

GOOD, NOT, BROKEN, LARGE = 200, 415, 422, 413 # answers: a prediction, not a picture, a damaged one, too many pixels
MAX_PIXELS = 2_000_000 # of the server that gets them, so that true bombs can be small


def saved(picture, kind='PNG', **options):
    "An array, or an `Image`, as a file."
    file, image = io.BytesIO(), picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(file, kind, **options)
    return file.getvalue()


def noise(*shape, dtype=np.uint8): return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)
def chunk(kind, data, crc=None): return struct.pack('!I', len(data)) + kind + data + struct.pack('!I', zlib.crc32(kind + data) if crc is None else crc)


def png(width, height, depth=8, colour=0, before=b'', data=b'', end=True, interlace=0):
    "A PNG that may lie."
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('!IIBBBBB', width, height, depth, colour, 0, 0, interlace))
            + before + chunk(b'IDAT', zlib.compress(data)) + (chunk(b'IEND', b'') if end else b''))


def gif(width, height, screen=None):
    "A GIF that may lie about its size."
    sw, sh = screen or (width, height)
    return (b'GIF89a' + struct.pack('<HHBBB', sw, sh, 0x80, 0, 0) + bytes(6) + b',' + struct.pack('<HHHHB', 0, 0, width, height, 0)
            + b'\x02\x02\x44\x01\x00;')


def tiff(tags, order='<', next_ifd=0, content=bytes(64)):
    "A TIFF of any tags: `(tag, type, count, value)`."
    head = (b'II*\0' if order == '<' else b'MM\0*') + struct.pack(order + 'I', 8)
    ifd = struct.pack(order + 'H', len(tags)) + b''.join(struct.pack(order + 'HHII', *tag) for tag in tags)
    return head + ifd + struct.pack(order + 'I', next_ifd) + content


def tiff_of(width, height, compression=1, bits=8, offset=110, n_bytes=64, photometric=1):
    "The tags of a grey TIFF."
    return [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, compression), (262, 3, 1, photometric),
            (273, 4, 1, offset), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, n_bytes)]


def bmp(width, height, bits=24, offset=54):
    "A BMP that may lie."
    return b'BM' + struct.pack('<IHHI', 200, 0, 0, offset) + struct.pack('<IiiHHIIiiII', 40, width, height, 1, bits, 0, 0, 0, 0, 0, 0) + bytes(100)


def webp_header(width, height):
    "A WebP that says it is large, and ends."
    canvas = struct.pack('<I', width - 1)[:3] + struct.pack('<I', height - 1)[:3]
    body = b'VP8X' + struct.pack('<I', 10) + bytes(4) + canvas
    lossless = struct.pack('<BI', 0x2f, (min(width, 16384) - 1) | (min(height, 16384) - 1) << 14) + bytes(20)
    body += b'VP8L' + struct.pack('<I', len(lossless)) + lossless + b'\0'*(len(lossless) % 2)
    return b'RIFF' + struct.pack('<I', 4 + len(body)) + b'WEBP' + body


def jpeg_with(segments, picture=None):
    "A JPEG with more segments `(marker, content)` at its beginning."
    whole = saved(noise(40, 40, 3) if picture is None else picture, 'JPEG')
    return whole[:2] + b''.join(bytes([0xff, m]) + struct.pack('!H', len(c) + 2) + c for m, c in segments) + whole[2:]


def archive():
    "A ZIP file."
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as z: z.writestr('x.txt', 'hello')
    return file.getvalue()


def animated(kind, n=3, **options):
    "Several frames, each of another brightness."
    frames = [Image.fromarray(np.full((30, 30, 3), 60*i % 226 + 30, np.uint8)) for i in range(n)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)


SVG = b'''<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>
<svg xmlns="http://www.w3.org/2000/svg" width="30" height="30"><text>&x;</text><script>alert(1)</script></svg>'''


def bombs():
    "Small files that would become large in memory."
    flat = np.zeros((1500, 1500), np.uint8)
    yield 'png bomb', saved(flat), LARGE
    yield 'png bomb, one bit', saved(Image.new('1', (20_000, 20_000))), LARGE
    yield 'png bomb, palette', saved(Image.new('P', (3000, 3000))), LARGE
    yield 'png bomb, 16 bits', saved(np.zeros((1500, 1500), np.uint16)), LARGE
    yield 'gif bomb', saved(flat, 'GIF'), LARGE
    yield 'jpeg bomb', saved(flat, 'JPEG'), LARGE
    yield 'webp bomb', saved(np.zeros((1500, 1500, 3), np.uint8), 'WEBP', lossless=True, method=0), LARGE
    for compression in 'tiff_deflate', 'tiff_lzw', 'packbits': yield f'tiff bomb, {compression}', saved(flat, 'TIFF', compression=compression), LARGE
    yield 'bmp bomb', bmp(40_000, 40_000, 1), LARGE
    yield 'gif, a large frame on a small screen', gif(65_535, 65_535, (10, 10)), (LARGE, BROKEN, GOOD)
    yield 'png, many times its size in data', png(30, 30, data=bytes(50_000_000)), (GOOD, BROKEN)
    yield 'png, the largest of all', png(2**31 - 1, 2**31 - 1), (LARGE, BROKEN, NOT)
    yield 'png, large and empty', png(60_000, 60_000), LARGE
    yield 'png, just too many pixels', png(MAX_PIXELS + 1, 1), LARGE
    yield 'tiff, large and empty', tiff(tiff_of(60_000, 60_000)), LARGE
    yield 'tiff, largest', tiff(tiff_of(2**32 - 1, 2**32 - 1)), (LARGE, BROKEN, NOT)
    yield 'webp, large and empty', webp_header(16_383, 16_383), (LARGE, BROKEN, NOT)
    yield 'webp, largest canvas', webp_header(2**24, 2**24), (LARGE, BROKEN, NOT)
    yield 'bmp, largest', bmp(2**31 - 1, 2**31 - 1), (LARGE, BROKEN, NOT)
    yield 'apng of many frames', animated('PNG', 100), GOOD


def texts():
    "Chunks of text, colour and camera facts that are too large, or wrong."
    small, blow = noise(30, 30), zlib.compress(bytes(80_000_000))
    row = bytes(31*30)
    yield 'zTXt bomb', png(30, 30, before=chunk(b'zTXt', b'key\0\0' + blow), data=row), (GOOD, BROKEN)
    yield 'iTXt bomb', png(30, 30, before=chunk(b'iTXt', b'key\0\1\0\0\0' + blow), data=row), (GOOD, BROKEN)
    yield 'iCCP bomb', png(30, 30, before=chunk(b'iCCP', b'key\0\0' + blow), data=row), (GOOD, BROKEN)
    yield 'ten thousand texts', png(30, 30, before=b''.join(chunk(b'tEXt', b'k%d\0v' % i) for i in range(10_000)), data=row), (GOOD, BROKEN)
    yield 'a long text', png(30, 30, before=chunk(b'tEXt', b'key\0' + b'x'*3_000_000), data=row), (GOOD, BROKEN)
    yield 'eXIf of noise', png(30, 30, before=chunk(b'eXIf', noise(500).tobytes()), data=row), (GOOD, BROKEN)
    yield 'EXIF that points into itself', jpeg_with([(0xe1, b'Exif\0\0II*\0\x08\0\0\0' + struct.pack('<HHHIIHHIII', 2, 0x8769, 4, 1, 8, 0x112, 3, 1, 6, 8))]), (GOOD, BROKEN)
    yield 'EXIF of an unknown turn', jpeg_with([(0xe1, b'Exif\0\0II*\0\x08\0\0\0' + struct.pack('<HHHIII', 1, 0x112, 3, 1, 99, 0))]), GOOD
    yield 'EXIF cut off', jpeg_with([(0xe1, b'Exif\0\0II*\0\xff\xff\xff\x7f')]), (GOOD, BROKEN)
    yield 'EXIF with a huge count', jpeg_with([(0xe1, b'Exif\0\0II*\0\x08\0\0\0' + struct.pack('<HHHIII', 1, 0x112, 3, 2**32 - 1, 26, 0))]), (GOOD, BROKEN)
    yield 'forty segments of EXIF', jpeg_with([(0xe1, b'Exif\0\0' + bytes(65_000))]*40), (GOOD, BROKEN)
    yield 'ICC profile of 200 parts', jpeg_with([(0xe2, b'ICC_PROFILE\0' + bytes([i + 1, 200]) + bytes(20_000)) for i in range(200)]), (GOOD, BROKEN)
    yield 'ICC profile of noise', saved(small, icc_profile=noise(100_000).tobytes()), (GOOD, BROKEN)
    yield 'XMP with entities', jpeg_with([(0xe1, b'http://ns.adobe.com/xap/1.0/\0' + SVG)]), GOOD
    yield 'comment of 60 kB', jpeg_with([(0xfe, bytes(60_000))]*30), GOOD
    yield 'MPO of one', jpeg_with([(0xe2, b'MPF\0II*\0\x08\0\0\0\xff\xff' + bytes(100))]), (GOOD, BROKEN, NOT)


def wrong():
    "What is no picture, or none that is read."
    small, rgb = Image.fromarray(noise(30, 30)), Image.fromarray(noise(30, 30, 3))
    plain = dict(empty=b'', byte=b'\0', text=b'hello', html=b'<html><script>alert(1)</script>', svg=SVG, gzip=gzip.compress(SVG), zip=archive(),
                 pdf=b'%PDF-1.7\n1 0 obj', elf=b'\x7fELF' + bytes(60), mp4=b'\0\0\0\x18ftypmp42' + bytes(50), avif=b'\0\0\0\x1cftypavif' + bytes(50),
                 heic=b'\0\0\0\x18ftypheic' + bytes(50), wave=b'RIFF\x24\0\0\0WAVEfmt ' + bytes(30), pickle=b'\x80\x04cos\nsystem\n(S"true"\ntR.',
                 noise=noise(5000).tobytes(), zeros=bytes(100_000), postscript=b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', utf16='PNG'.encode('utf-16'))
    for name, content in plain.items(): yield name, content, (NOT, BROKEN) if name == 'wave' else NOT
    for kind in 'PPM', 'ICO', 'PCX', 'TGA', 'ICNS', 'JPEG2000', 'SGI', 'IM', 'DDS', 'MSP', 'XBM', 'EPS', 'PDF':
        try: yield f'{kind}, which is not read', saved({'MSP': small.convert('1'), 'XBM': small.convert('1')}.get(kind, rgb), kind), NOT
        except (OSError, KeyError): pass # a Pillow without it
    for name, begin in dict(png=b'\x89PNG\r\n\x1a\n', jpeg=b'\xff\xd8\xff', gif=b'GIF89a', bmp=b'BM', tiff=b'II*\0', motorola=b'MM\0*', webp=b'RIFF\x10\0\0\0WEBP').items():
        yield f'{name}, only the beginning', begin, (NOT, BROKEN)
        yield f'{name}, then zeros', begin + bytes(500), (NOT, BROKEN, GOOD) if name == 'gif' else (NOT, BROKEN)
        yield f'{name}, then noise', begin + noise(5000).tobytes(), (NOT, BROKEN, LARGE)
        yield f'{name}, then text', begin + b'<script>alert(1)</script>'*20, (NOT, BROKEN, LARGE)


def damaged():
    "Pictures with a wound."
    row, plain = bytes(31*30), noise(30, 30, 3)
    for kind in 'PNG', 'JPEG', 'GIF', 'WEBP', 'BMP', 'TIFF':
        whole = saved(plain, kind)
        for share in 0.1, 0.5, 0.95: yield f'{kind}, {share:.0%} of it', whole[:int(share*len(whole))], (BROKEN, NOT, GOOD) if kind == 'GIF' else (BROKEN, NOT)
    yield 'png of no width', png(0, 30), (BROKEN, NOT)
    yield 'png of no height', png(30, 0), (BROKEN, NOT)
    yield 'gif of no size', gif(0, 0), (BROKEN, NOT)
    yield 'bmp of no size', bmp(0, 0), (BROKEN, NOT)
    yield 'bmp of negative width', bmp(-30, 30), (BROKEN, NOT, LARGE)
    yield 'bmp upside down', bmp(5, -5), (GOOD, BROKEN)
    yield 'bmp that begins beyond its end', bmp(5, 5, offset=10**9), (BROKEN, NOT)
    yield 'tiff of no size', tiff(tiff_of(0, 0)), (BROKEN, NOT)
    yield 'jpeg of no size', saved(plain, 'JPEG').replace(b'\0\x11\x08\0\x1e\0\x1e', b'\0\x11\x08\0\0\0\0'), (BROKEN, NOT)
    yield 'png without data', png(30, 30), BROKEN
    yield 'png without an end', png(30, 30, data=row, end=False), (GOOD, BROKEN)
    yield 'png with a wrong checksum', saved(plain).replace(b'IDAT', b'IDAU', 1), (BROKEN, NOT)
    yield 'png of an unknown depth', png(30, 30, depth=7, data=row), (BROKEN, NOT)
    yield 'png of an unknown colour', png(30, 30, colour=5, data=row), (BROKEN, NOT)
    yield 'png with a chunk of 4 GiB', png(30, 30, before=struct.pack('!I', 2**32 - 1) + b'tEXt', data=row), (BROKEN, NOT)
    yield 'png of unknown filters', png(30, 30, data=b''.join(b'\x77' + bytes(30) for _ in range(30))), BROKEN
    yield 'png with a palette missing', png(30, 30, colour=3, data=row), (GOOD, BROKEN)
    yield 'png, interlaced and empty', png(30, 30, interlace=1), BROKEN
    yield 'tiff that points to itself', tiff(tiff_of(8, 8), next_ifd=8), (GOOD, BROKEN, NOT)
    yield 'tiff with data beyond its end', tiff(tiff_of(8, 8, offset=2**31)), (BROKEN, NOT)
    yield 'tiff with a strip of 4 GiB', tiff(tiff_of(8, 8, n_bytes=2**32 - 1)), (GOOD, BROKEN, NOT)
    yield 'tiff with a tag of 4 GiB', tiff([*tiff_of(8, 8), (320, 3, 2**32 - 1, 8)]), (GOOD, BROKEN, NOT)
    yield 'tiff of an unknown compression', tiff(tiff_of(8, 8, compression=60_000)), (BROKEN, NOT)
    yield 'tiff of 64 bits', tiff(tiff_of(2, 2, bits=64, photometric=9)), (BROKEN, NOT)
    yield 'tiff with deflate of zeros', tiff(tiff_of(8, 8, compression=8)), (BROKEN, NOT)
    yield 'tiff of JPEG without tables', tiff(tiff_of(8, 8, compression=7)), (BROKEN, NOT)
    yield 'big tiff', b'II+\0\x08\0\0\0' + struct.pack('<Q', 16) + bytes(200), (BROKEN, NOT)


def unusual():
    "Pictures that are fine, though few send them; the first frame counts."
    grey, rgb = noise(40, 30), noise(40, 30, 3)
    yield 'one pixel', saved(noise(1, 1)), GOOD
    yield 'very wide', saved(noise(1, 20_000)), GOOD
    yield 'very high', saved(noise(20_000, 1)), GOOD
    yield 'gif, animated', animated('GIF'), GOOD
    yield 'webp, animated', animated('WEBP', lossless=True), GOOD
    yield 'png, animated', animated('PNG'), GOOD
    yield 'tiff of three pages', animated('TIFF'), GOOD
    yield 'jpeg, CMYK', saved(Image.fromarray(rgb).convert('CMYK'), 'JPEG'), GOOD
    yield 'tiff, CMYK', saved(Image.fromarray(rgb).convert('CMYK'), 'TIFF'), GOOD
    yield 'tiff, LAB', saved(Image.fromarray(rgb).convert('LAB'), 'TIFF'), (GOOD, BROKEN)
    yield 'tiff, YCbCr', saved(Image.fromarray(rgb).convert('YCbCr'), 'TIFF'), (GOOD, BROKEN)
    yield 'tiff, 16 bits', saved(noise(40, 30, dtype=np.uint16), 'TIFF'), GOOD
    yield 'tiff, floats', saved(np.linspace(0, 255, 1200, dtype=np.float32).reshape(40, 30), 'TIFF'), GOOD
    yield 'tiff, not a number', saved(np.full((40, 30), np.nan, np.float32), 'TIFF'), (GOOD, BROKEN)
    yield 'tiff, infinite', saved(np.full((40, 30), np.inf, np.float32), 'TIFF'), (GOOD, BROKEN)
    yield 'png, 16 bits', saved(noise(40, 30, dtype=np.uint16)), GOOD
    yield 'png, one bit', saved(Image.fromarray(grey).convert('1')), GOOD
    yield 'png, palette', saved(Image.fromarray(rgb).convert('P')), GOOD
    yield 'png, palette with a hole', saved(Image.fromarray(rgb).convert('P'), transparency=3), GOOD
    yield 'png, grey and alpha', saved(Image.fromarray(noise(40, 30, 2), 'LA')), GOOD
    yield 'png, colour and alpha', saved(noise(40, 30, 4)), GOOD
    yield 'png, transparent altogether', saved(np.zeros((40, 30, 4), np.uint8)), GOOD
    yield 'png, then a ZIP', saved(grey) + archive(), GOOD
    yield 'jpeg, then a page', saved(grey, 'JPEG') + b'<html><script>alert(1)</script>', GOOD
    yield 'gif, then JavaScript', saved(grey, 'GIF') + b'*/=1;alert(1)', GOOD
    yield 'jpeg with PHP in a comment', jpeg_with([(0xfe, b'<?php system($_GET["c"]); ?>')]), GOOD
    yield 'gif that is JavaScript', b'GIF89a/*' + gif(30, 30)[8:] + b'*/=alert(1)', (GOOD, BROKEN, LARGE, NOT)


def mutants(
    n:int, # of each type
    seed:int=0, # of the changes
):
    "Good pictures with a few bytes changed, cut or doubled."
    r, anything = random.Random(seed), (GOOD, NOT, BROKEN, LARGE)
    for kind, options in ('PNG', {}), ('JPEG', {}), ('GIF', {}), ('WEBP', {}), ('WEBP', dict(lossless=True)), ('BMP', {}), ('TIFF', dict(compression='tiff_lzw')), ('TIFF', {}):
        whole = saved(noise(20, 20, 3), kind, **options)
        for i in range(n):
            changed = bytearray(whole)
            for _ in range(r.choice([1, 2, 8, 40])): changed[r.randrange(min(len(changed), r.choice([40, 10**6])))] = r.randrange(256)
            a, b = sorted(r.randrange(len(changed)) for _ in 'ab')
            if i % 5 == 3: del changed[a:b]
            if i % 5 == 4: changed[a:a] = changed[a:b]
            yield f'{kind} {options} changed {seed}.{i}', bytes(changed), anything


def corpus():
    "All of them as `(name, content, statuses)`."
    for part in bombs, texts, wrong, damaged, unusual:
        for name, content, statuses in part(): yield name, content, statuses if isinstance(statuses, tuple) else (statuses,)


# Requests

def forms():
    "Forms that are none: `(name, content type, body)`; all are refused with 413, 415 or 422."
    kind, head = 'multipart/form-data; boundary=x', b'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    part, end = b'--x\r\n' + head, b'\r\n--x--\r\n'
    yield 'no boundary', 'multipart/form-data', part + b'a' + end
    yield 'empty boundary', 'multipart/form-data; boundary=', part + b'a' + end
    yield 'long boundary', 'multipart/form-data; boundary=' + 'x'*71, part + b'a' + end
    yield 'another boundary', 'multipart/form-data; boundary=y', part + b'a' + end
    yield 'boundary of patterns', 'multipart/form-data; boundary=".*(a+)+$"', part + b'a' + end
    yield 'nothing', kind, b''
    yield 'only an end', kind, b'--x--\r\n'
    yield 'no end', kind, part + b'a'
    yield 'half an end', kind, part + b'a\r\n--x'
    yield 'no blank line', kind, b'--x\r\nContent-Disposition: form-data; name="files"' + end
    yield 'no disposition', kind, b'--x\r\nContent-Type: image/png\r\n\r\na' + end
    yield 'no name', kind, b'--x\r\nContent-Disposition: form-data\r\n\r\na' + end
    yield 'two dispositions', kind, b'--x\r\nContent-Disposition: form-data; name="model"\r\n' + head + b'a' + end
    yield 'another name', kind, part.replace(b'files', b'file') + b'a' + end
    yield 'two models', kind, (part.replace(b'files', b'model') + b'a\r\n')*2 + b'--x--\r\n'
    yield 'a model of no text', kind, part.replace(b'files', b'model') + b'\xff\xfe\r\n' + part + b'a' + end
    yield 'only a model', kind, part.replace(b'files', b'model') + b'a' + end
    yield 'an attachment', kind, part.replace(b'form-data', b'attachment') + b'a' + end
    yield 'a quote that never ends', kind, part.replace(b'"a.png"', b'"a.png') + b'a' + end
    yield 'a head of 200 kB', kind, part.replace(b'a.png', b'a'*200_000) + b'a' + end
    yield 'many heads', kind, b'--x\r\n' + b'X: y\r\n'*20_000 + b'\r\na' + end
    yield 'backslashes', kind, part.replace(b'a.png', b'\\'*50_001) + b'a' + end
    yield 'ten thousand parts', kind, (part + b'a\r\n')*10_000 + b'--x--\r\n'
    yield 'a form in a form', kind, b'--x\r\nContent-Type: multipart/mixed; boundary=y\r\n\r\n--y\r\n\r\na\r\n--y--' + end
    yield 'lines of Unix', kind, (part + b'a' + end).replace(b'\r\n', b'\n')
    yield 'JSON', kind, b'{"pictures": []}'
    yield 'zeros', kind, bytes(100_000)
    yield 'boundaries only', kind, b'--x\r\n'*50_000


def jsons():
    "JSON that is none, or says too much: `(name, body)`; all are refused with 413 or 422."
    row = lambda value: b'{"pictures": [{"array": [' + b','.join([b'[' + b','.join([value]*28) + b']']*28) + b']}]}'
    plain = dict(empty=b'', space=b' ', null=b'null', number=b'1', text=b'"a"', list=b'[]', true=b'true', object=b'{}', cut=b'{"pictures": [{"arr', comma=b'{"pictures": [1,]}',
                 quote=b"{'pictures': []}", none=b'{"pictures": []}', nothing=b'{"pictures": null}', strange=b'{"pictures": [1], "x": 1}', twice=b'{"pictures": 1, "pictures": 2}',
                 comment=b'{/* */}', word=b'{"pictures": [{"base64": 1}]}', short=b'{"pictures": [{"base64": "a"}]}', hole=b'{"pictures": [{}]}',
                 both=b'{"pictures": [{"base64": "AAAA", "array": [[1]]}]}', model=b'{"model": 1, "pictures": [{"base64": "AAAA"}]}',
                 utf16='{"pictures": []}'.encode('utf-16'), utf8=b'\xff\xfe{"pictures": []}', zero=b'{"pictures": []}\0', escape=b'{"pictures": [{"base64": "\\ud800AAA"}]}',
                 alphabet=b'{"pictures": [{"base64": "AA_-"}]}', padding=b'{"pictures": [{"base64": "AAAAA"}]}', newline=b'{"pictures": [{"base64": "AAAA\\nAAAA"}]}',
                 flat=b'{"pictures": [{"array": [1, 2]}]}', ragged=b'{"pictures": [{"array": [[1, 2], [1]]}]}', small=b'{"pictures": [{"array": [[1, 2], [3, 4]]}]}',
                 colour=b'{"pictures": [{"array": [[[1, 2, 3]]]}]}', four=b'{"pictures": [{"array": [[[1, 2, 3, 4]]]}]}', mixed=b'{"pictures": [{"array": [[1, [1, 2, 3]]]}]}',
                 surrogate=b'{"model": "\\udc80", "pictures": [{"base64": "AAAA"}]}', digits=b'{"pictures": ' + b'9'*200_000 + b'}', exponent=b'{"pictures": 1e999999999}')
    yield from plain.items()
    for name in 'NaN', 'Infinity', '-Infinity', '1e400', '256', '-1', '1.5', '1.0', 'true', '"1"', 'null', '1e1', '9'*5000, '[]', '{}': yield f'a pixel of {name[:20]}', row(name.encode())
    for n in 1000, 100_000, 1_000_000:
        yield f'{n} lists in each other', b'{"pictures": ' + b'['*n
        yield f'{n} closed lists in each other', b'{"pictures": ' + b'['*n + b']'*n + b'}'
        yield f'{n} objects in each other', b'{"a":'*n + b'1' + b'}'*n
    yield 'a million empty lists', b'{"pictures": [' + b'[],'*1_000_000 + b'[]]}'
    yield 'a million names', b'{' + b','.join(b'"k%d":1' % i for i in range(500_000)) + b'}'
    yield 'a hundred thousand pictures', b'{"pictures": [' + b'{"base64":"AAAA"},'*100_000 + b'{"base64":"AAAA"}]}'
    yield 'one long string', b'{"pictures": [{"base64": "' + b'A'*9_000_000 + b'!"}]}'
    yield 'a long unknown name', b'{"' + b'x'*1_000_000 + b'": 1, "pictures": []}'


def heads():
    "Beginnings of requests that are none: `(name, bytes)`; the answer is 4xx, or a closed door."
    get, post = b'GET /healthz HTTP/1.1\r\nHost: x\r\n', b'POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n'
    yield 'noise', noise(3000).tobytes() + b'\r\n\r\n'
    yield 'TLS', b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03' + bytes(500) + b'\r\n\r\n'
    yield 'HTTP/2', b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n' + bytes(50)
    yield 'HTTP/9', b'GET / HTTP/9.9\r\n\r\n'
    yield 'no version', b'GET /\r\n\r\n'
    yield 'no path', b'GET HTTP/1.1\r\n\r\n'
    yield 'spaces', b'GET /a b c HTTP/1.1\r\nHost: x\r\n\r\n'
    yield 'a long path', b'GET /' + b'a'*200_000 + b' HTTP/1.1\r\nHost: x\r\n\r\n'
    yield 'a long header', get + b'X: ' + b'a'*1_000_000 + b'\r\n\r\n'
    yield 'many headers', get + b''.join(b'X-%d: y\r\n' % i for i in range(20_000)) + b'\r\n'
    yield 'a header without a name', get + b': y\r\n\r\n'
    yield 'a header with a space', get + b'X : y\r\n\r\n'
    yield 'a header of zeros', get + b'X: \0\0\r\n\r\n'
    yield 'two lengths', post + b'Content-Length: 2\r\nContent-Length: 5\r\n\r\n{}abc'
    yield 'length and chunks', post + b'Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n\r\n'
    yield 'a negative length', post + b'Content-Length: -1\r\n\r\n{}'
    yield 'a length of letters', post + b'Content-Length: two\r\n\r\n{}'
    yield 'a length with a plus', post + b'Content-Length: +2\r\n\r\n{}'
    yield 'a long length', post + b'Content-Length: ' + b'9'*40 + b'\r\n\r\n{}'
    yield 'a length of a page', post + b'Content-Length: 99999999999\r\n\r\n{}'
    yield 'no length', post + b'\r\n'
    yield 'a chunk of letters', post + b'Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n'
    yield 'a negative chunk', post + b'Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n'
    yield 'a chunk of 16 EiB', post + b'Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}\r\n0\r\n\r\n'
    yield 'unknown coding', post + b'Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n'
    yield 'large, but it asks first', post + b'Expect: 100-continue\r\nContent-Length: 999999999\r\n\r\n'
    yield 'an upgrade', get.replace(b'/healthz', b'/v1/predict') + b'Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n'
    yield 'a proxy', b'CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n'
    yield 'an absolute path', b'GET http://169.254.169.254/latest HTTP/1.1\r\nHost: x\r\n\r\n'
    yield 'a trace', b'TRACE / HTTP/1.1\r\nHost: x\r\n\r\n'
