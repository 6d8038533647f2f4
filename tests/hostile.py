"""A corpus of attacks, made by code: model folders and files, adapters, files of rows. What they would run writes a canary.

`python hostile.py FOLDER` reads every file of rows under a memory limit and prints {case: [seconds, [reasons]]}.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import resource
import socket
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Make = Callable[[Path, Path], None]  # (the model's folder or the file of rows, the canary that must not appear)

DEPTH = 100_000
MEMORY = 2 << 30


class Bomb:
    """Unpickled, it writes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def code(canary: Path) -> str:
    return f"import pathlib; pathlib.Path({str(canary)!r}).touch()"


def pickled(name: str, protocol: int = 4) -> Make:
    return lambda folder, canary: put(folder, name, pickle.dumps({"weight": Bomb(canary)}, protocol))


def torch_zip(name: str) -> Make:
    """What torch.save writes: a zip with a pickle inside."""

    def make(folder: Path, canary: Path) -> None:
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w") as package:
            package.writestr("archive/data.pkl", pickle.dumps(Bomb(canary)))
        put(folder, name, target.getvalue())

    return make


def put(folder: Path, name: str, data: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def text(name: str, value: str) -> Make:
    return lambda folder, canary: put(folder, name, value.replace("CODE", code(canary)).encode("utf-8", "surrogatepass"))


def settings(name: str, **values: Any) -> Make:
    """The file's own settings and these."""

    def make(folder: Path, canary: Path) -> None:
        path = folder / name
        own = json.loads(path.read_text()) if path.is_file() else {}
        put(folder, name, json.dumps(own | values).replace("CANARY", str(canary)).encode())

    return make


def weights(header: str, size: int = 16) -> Make:
    data = header.encode()
    return lambda folder, canary: put(folder, "model.safetensors", struct.pack("<Q", len(data)) + data + bytes(size))


def tensor(first: int, last: int, *shape: int) -> str:
    return json.dumps({"dtype": "F32", "shape": shape or [(last - first) // 4], "data_offsets": [first, last]})


def both(*makes: Make) -> Make:
    def make(folder: Path, canary: Path) -> None:
        for each in makes:
            each(folder, canary)

    return make


def link(name: str, target: str) -> Make:
    return lambda folder, canary: (folder / name).symlink_to(target)


def unix_socket(folder: Path, canary: Path) -> None:
    here = os.getcwd()
    os.chdir(folder)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket")
    finally:
        os.chdir(here)


def only_gguf(data: bytes) -> Make:
    return lambda folder, canary: put(folder, "model.gguf", data)


def gguf(tensors: int = 0, entries: bytes = b"", count: int = 0) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, count) + entries


def gguf_text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


REPLACED = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 50} for _ in range(12)]


def tokenizer(**values: Any) -> Make:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    own = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    return (
        settings("tokenizer.json", **own, pre_tokenizer=None, post_processor=None, decoder=None, model=model, **values)
        if not values.keys() & own.keys()
        else settings("tokenizer.json", **(own | values), model=model)
    )


CODE_NAMED = {"AutoModelForCausalLM": "modeling.Evil", "AutoTokenizer": ["tokenization.Evil", None]}
LOOPS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
)
DOUBLES = (
    "{% set n = namespace(t='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}"
)
ESCAPES = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
FORMATS = (
    "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}{{ cycler.__init__.__globals__.os.system('touch CANARY') }}"
)

# ruff: noqa: E501 (tables)
# name → how it is made of a good folder, and a word of the reason
MODELS: dict[str, tuple[Make, str]] = {
    "auto_map in config": (settings("config.json", auto_map=CODE_NAMED), "auto_map"),
    "auto_map in tokenizer": (settings("tokenizer_config.json", auto_map=CODE_NAMED), "auto_map"),
    "auto_map in generation": (settings("generation_config.json", auto_map=CODE_NAMED), "auto_map"),
    "auto_map in processor": (settings("processor_config.json", auto_map=CODE_NAMED), "auto_map"),
    "auto_map by escapes": (text("processor_config.json", '{"\\u0061uto_map": {}}'), "auto_map"),
    "custom pipeline": (settings("config.json", custom_pipelines={"t": {"impl": "evil.P"}}), "custom_pipelines"),
    "kernel of a hub": (settings("config.json", _attn_implementation="evil/kernel"), "_attn_implementation"),
    "modeling code": (text("modeling_evil.py", "CODE"), "is code"),
    "generation code": (text("custom_generate/generate.py", "CODE"), "is code"),
    "start-up code": (text("evil.pth", "CODE"), "is code"),
    "pickle .bin": (pickled("pytorch_model.bin"), "pickled"),
    "pickle .pt": (torch_zip("consolidated.00.pt"), "pickled"),
    "pickle as safetensors": (pickled("model.safetensors"), "pickled"),
    "pickle as JSON": (pickled("config.json"), "pickled"),
    "pickle renamed": (pickled("vocab.txt"), "pickled"),
    "pickle renamed, protocol 0": (pickled("merges.txt", 0), "pickled"),
    "pickle renamed, protocol 1": (pickled("README.md", 1), "pickled"),
    "torch file renamed": (torch_zip("LICENSE"), "pickled"),
    "link to a file outside": (link("vocab.txt", "/etc/passwd"), "link that leaves"),
    "link to a folder outside": (link("more", "/etc"), "link that leaves"),
    "socket": (unix_socket, "regular file"),
    "fifo": (lambda folder, canary: os.mkfifo(folder / "vocab.txt"), "regular file"),
    "escape in a name": (text("\x1b[2J\x1b[1;1Hok.json", "{}"), "control characters"),
    "newline in a name": (text("a\nmodel.json", "{}"), "control characters"),
    "huge header": (lambda folder, canary: put(folder, "model.safetensors", struct.pack("<Q", 1 << 62)), "not a safetensors"),
    "negative offsets": (weights(f'{{"a": {tensor(-16, 0, 4)}}}'), "malformed"),
    "overlap": (weights(f'{{"a": {tensor(0, 12)}, "b": {tensor(8, 16)}}}'), "malformed"),
    "shape beyond its bytes": (weights(f'{{"a": {tensor(0, 16, 1 << 40, 1 << 40)}}}'), "does not match its shape"),
    "deep header": (weights("[" * DEPTH), "malformed"),
    "tensor twice": (weights(f'{{"a": {tensor(0, 16)}, "a": {tensor(0, 16)}}}'), "malformed"),
    "deep config": (text("config.json", '{"a":' * DEPTH), "not valid JSON"),
    "key twice": (text("config.json", '{"model_type": "llama", "model_type": "other"}'), "written twice"),
    "NaN": (text("config.json", '{"model_type": "llama", "rms_norm_eps": NaN}'), "NaN"),
    "endless number": (text("config.json", '{"vocab_size": 1' + "0" * 9999 + "}"), "not valid JSON"),
    "10^12 wide": (settings("config.json", hidden_size=10**12), "hidden_size=1000000000000"),
    "10^9 layers": (settings("config.json", num_hidden_layers=10**9), "num_hidden_layers"),
    "large embedding": (settings("config.json", vocab_size=60_000, hidden_size=60_000), "embedding"),
    "infinite experts": (text("config.json", '{"model_type": "mixtral", "num_local_experts": Infinity}'), "num_local_experts"),
    "index that leads out": (
        settings("model.safetensors.index.json", weight_map={"a": "../../secret.safetensors"}),
        "not in its folder",
    ),
    "template that loops": (settings("tokenizer_config.json", chat_template=LOOPS), "does not finish"),
    "template that doubles": (text("chat_template.jinja", DOUBLES), "template"),
    "template that escapes": (settings("tokenizer_config.json", chat_template=[{"name": "x", "template": ESCAPES}]), "Python internals"),
    "template that calls": (settings("tokenizer_config.json", chat_template=FORMATS), "Python internals"),
    "tokenizer that multiplies": (
        tokenizer(normalizer={"type": "Sequence", "normalizers": REPLACED}),
        "does not finish",
    ),
}  # fmt: skip

ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def adapter(files: Make = lambda folder, canary: None, **values: Any) -> Make:
    def make(folder: Path, canary: Path) -> None:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink(missing_ok=True)
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        put(folder, "adapter_config.json", json.dumps(ADAPTER | values).encode())
        files(folder, canary)

    return make


def kept(make: Make) -> Make:
    """A base model with an adapter's settings beside it."""
    return both(settings("adapter_config.json", **ADAPTER, base_model_name_or_path="/tmp/evil"), make)


IS_ADAPTER = "it is an adapter"
ADAPTERS: dict[str, tuple[Make, str]] = {
    "plain": (adapter(), IS_ADAPTER),
    "base at a URL": (adapter(base_model_name_or_path="https://evil.example/base"), IS_ADAPTER),
    "class to load": (adapter(auto_mapping={"base_model_class": "E", "parent_library": "os"}), IS_ADAPTER),
    "code named": (adapter(auto_map={"AutoModel": "evil.E"}), "auto_map"),
    "LoftQ": (adapter(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), IS_ADAPTER),
    "nonsense to save": (adapter(modules_to_save=["../../x"], rank_pattern={".*" * 50: 8}), IS_ADAPTER),
    "pickle": (adapter(pickled("adapter_model.bin")), "pickled"),
    "optimizer": (adapter(torch_zip("optimizer.pt")), "pickled"),
    "code": (adapter(text("peft_evil.py", "CODE")), "is code"),
    "beside a base": (kept(lambda folder, canary: None), IS_ADAPTER),
}

GGUFS: dict[str, bytes] = {
    "no magic": b"GGML" + bytes(60),
    "2^60 tensors": gguf(tensors=1 << 60),
    "2^60 settings": gguf(count=1 << 60),
    "text beyond the file": gguf(count=1, entries=gguf_text(b"a") + struct.pack("<I", 8) + gguf_text(b"x", 1 << 50)),
    "name beyond the file": gguf(count=1, entries=gguf_text(b"a", 1 << 63)),
    "list beyond the file": gguf(count=1, entries=gguf_text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 61)),
    "lists in lists": gguf(count=1, entries=gguf_text(b"a") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * 2),
    "unknown kind": gguf(count=1, entries=gguf_text(b"a") + struct.pack("<I", 99) + bytes(40)),
    "2^31 dimensions": gguf(tensors=1, entries=gguf_text(b"a") + struct.pack("<I", 1 << 31) + bytes(40)),
    "tensor beyond the file": gguf(
        tensors=1, entries=gguf_text(b"a") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 20, 0, 0) + bytes(64)
    ),
    "cut off": gguf(count=3, entries=gguf_text(b"a")),
}


def zeros(path: Path, kind: str, size: int = 300 << 20) -> None:
    """One line of spaces, hundreds of times as large as the file."""
    import zstandard

    block = b" " * (1 << 20)
    with gzip.open(path, "wb", 6) if kind == "gzip" else zstandard.open(path, "wb") as stream:
        for _ in range(size >> 20):
            stream.write(block)


def zipped(path: Path, entries: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as package:
        for name, data in entries.items():
            package.writestr(name, data)


TYPES_XML = (
    b'<?xml version="1.0"?><Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    b'<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    b'<Override PartName="/word/document.xml" ContentType='
    b'"application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>'
)
RELATIONS = (
    b'<?xml version="1.0"?><Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    b'<Relationship Id="r" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" '
    b'Target="word/document.xml"/></Relationships>'
)
WORD = b"http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def laughs(count: int) -> bytes:
    names = [b'<!ENTITY a0 "ha">'] + [
        b'<!ENTITY a%d "%s">' % (number, b"&a%d;" % (number - 1) * 10) for number in range(1, count)
    ]
    return b"<!DOCTYPE x [" + b"".join(names) + b"]>"


def docx(path: Path, prologue: bytes, body: bytes) -> None:
    document = b'<?xml version="1.0"?>' + prologue + b'<w:document xmlns:w="%s"><w:body>' % WORD
    document += b"<w:p><w:r><w:t>%s</w:t></w:r></w:p></w:body></w:document>" % body
    zipped(path, {"[Content_Types].xml": TYPES_XML, "_rels/.rels": RELATIONS, "word/document.xml": document})


def pdf(path: Path) -> None:
    """One page, whose content unpacks to a thousand times its size."""
    import zlib

    packed = zlib.compress(b"(a) Tj " * (300 << 17), 9)
    parts = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/Contents 4 0 R/MediaBox[0 0 9 9]>>",
        b"<</Filter/FlateDecode/Length %d>>stream\n%s\nendstream" % (len(packed), packed),
    ]
    out, places = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, start=1):
        places.append(len(out))
        out += b"%d 0 obj%s endobj\n" % (number, part)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    start = len(out)
    out += b"xref\n0 5\n0000000000 65535 f \n" + table + b"trailer<</Size 5/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % start
    path.write_bytes(out)


def parquet_with_pickle(path: Path, canary: Path) -> None:
    """A column whose type is a pickle, which pyarrow before 14.0.1 loaded (CVE-2023-47248)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Bomb(canary)),
    }
    schema = pa.schema([pa.field("text", pa.string()), pa.field("x", pa.int64(), metadata=extension)])
    pq.write_table(pa.table({"text": ["a good row"], "x": [1]}, schema=schema), path)


def arrow_with_wrong_offsets(path: Path) -> None:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    batch = pa.record_batch({"text": pa.array(["one", "two", "three"])})
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    raw = bytearray(sink.getvalue().to_pybytes())
    at = raw.rfind(struct.pack("<4i", 0, 3, 6, 11))
    raw[at : at + 16] = struct.pack("<4i", 0, 3, 6, 1 << 30)
    path.write_bytes(raw)


def good_line(path: Path, ending: bytes) -> None:
    path.write_bytes(b'{"text": "good"}\n' + ending)


# name of the file → how it is made, a word of the first reason, rows that are good nevertheless (-1: most of them)
DATA: dict[str, tuple[Make, str, int]] = {
    "deep.jsonl": (lambda path, canary: good_line(path, b"[" * DEPTH + b"]" * DEPTH), "nested too deeply", 1),
    "deep.json": (lambda path, canary: put(path.parent, path.name, b"[" + b'{"a":' * DEPTH), "does not end", 0),
    "twice.jsonl": (lambda path, canary: good_line(path, b'{"text": "a", "text": "b"}'), "written twice", 1),
    "nan.jsonl": (lambda path, canary: good_line(path, b'{"text": NaN}'), "not JSON", 1),
    "digits.jsonl": (lambda path, canary: good_line(path, b'{"text": ' + b"9" * 100_000 + b"}"), "not JSON", 1),
    "nul.jsonl": (lambda path, canary: good_line(path, b'{"text": "a\\u0000b"}'), "NUL", 1),
    "pickle.jsonl": (lambda path, canary: put(path.parent, path.name, pickle.dumps(Bomb(canary))), "not", 0),
    "zip.jsonl": (lambda path, canary: zipped(path, {"../../evil": b"x" * 99}), "zip archive", 0),
    "bomb.jsonl.gz": (lambda path, canary: zeros(path, "gzip"), "max_line_bytes", 0),
    "bomb.jsonl.zst": (lambda path, canary: zeros(path, "zstd"), "max_line_bytes", 0),
    "bomb.csv": (lambda path, canary: sparse_csv(path), "max_line_bytes", 0),
    "quotes.csv": (lambda path, canary: put(path.parent, path.name, b'text\n"' + b'a""\n' * 9999), "malformed CSV", -1),
    "pickle.parquet": (parquet_with_pickle, "", 1),
    "torn.parquet": (lambda path, canary: put(path.parent, path.name, b"PAR1" + b"\xff" * 99 + b"PAR1"), "unreadable", 0),
    "torn.arrow": (lambda path, canary: put(path.parent, path.name, b"\xff\xff\xff\xff\xf0\xff\xff\x7f" * 9), "unreadable", 0),
    "offsets.arrow": (lambda path, canary: arrow_with_wrong_offsets(path), "unreadable", 0),
    "laughs.docx": (lambda path, canary: docx(path, laughs(12), b"&a11;"), "DOCX", 0),
    "secret.docx": (lambda path, canary: docx(path, b'<!DOCTYPE x [<!ENTITY s SYSTEM "/etc/passwd">]>', b"&s;"), "DOCX", 0),
    "large.docx": (lambda path, canary: docx(path, b"", b"a" * (257 << 20)), "more than 256 MiB", 0),
    "bomb.pdf": (lambda path, canary: pdf(path), "PDF", 0),
    "loop.pdf": (lambda path, canary: put(path.parent, path.name, b"%PDF-1.4\nstartxref\n0\n%%EOF"), "PDF", 0),
    "deep.html": (lambda path, canary: put(path.parent, path.name, b"<div>" * DEPTH), "more than 256 deep", 0),
    "image.jsonl": (lambda path, canary: image_line(path), "leads out", 0),
}  # fmt: skip


def sparse_csv(path: Path) -> None:
    with path.open("wb") as stream:
        stream.write(b'text\n"')
        stream.truncate(200 << 20)


def image_line(path: Path) -> None:
    image = {"type": "image", "image": "../../../../etc/passwd"}
    row = {"messages": [{"role": "user", "content": [image]}, {"role": "assistant", "content": "a"}]}
    path.write_text(json.dumps(row) + "\n")


def outcomes(path: Path) -> list[str]:
    """Of every row of a file: "" where it is good, else the reason."""
    from forge_ray.config.data import DataConfig
    from forge_ray.data.read.ingest import index_file
    from forge_ray.data.read.readers import image_reader, read_raw
    from forge_ray.data.read.sources import expand
    from forge_ray.data.read.strict_json import Reject
    from forge_ray.data.record.schema import parse_line, parse_record

    (source,) = expand(DataConfig.model_validate({"sources": [{"path": str(path)}]}))
    reasons = []
    for chunk in index_file(source.path, source.name, source.format).chunks:
        for raw in read_raw(chunk, 1 << 20):
            try:
                if raw.reason:
                    raise Reject(raw.reason)
                if raw.raw is None:
                    parse_record(raw.value, read_image=image_reader(chunk))
                else:
                    parse_line(raw.raw, read_image=image_reader(chunk))
                reasons.append("")
            except Reject as reason:
                reasons.append(str(reason))
    return reasons


def main(folder: Path) -> None:
    import docx  # noqa: F401
    import lxml.html  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import pypdf  # noqa: F401

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    report = {}
    for name in DATA:
        began = time.process_time()
        try:
            reasons = outcomes(folder / name)
        except BaseException as error:
            reasons = [f"ERROR {type(error).__name__}: {error}"[:300]]
        report[name] = [time.process_time() - began, reasons[:5]]
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
