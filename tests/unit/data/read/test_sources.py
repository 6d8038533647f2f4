"""Which files a source names: splits, tables of versions, markers of other programs, names in any letters."""

from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path

import pytest

from forge_ray.config.base import resolved
from forge_ray.config.data import DataConfig
from forge_ray.data.read.sources import expand, folder_lines
from forge_ray.data.read.splits import split_named
from forge_ray.errors import ConfigError, DataError, NotFound

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(path: str, any_split: bool = False, **source: str) -> list[str]:
    config = DataConfig.model_validate({"sources": [{"path": path, **source}]})
    return [file.name for file in expand(config, any_split)]


def fill(*files: str) -> None:
    for name in files:
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_bytes(b"x")


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/test_sft-00000-of-00001.parquet", "test_sft"),
        ("default/validation/0000.parquet", "validation"),
        ("train.jsonl.gz", "train"),
        ("chats_test.csv", "test"),
        ("dev-2.json", "dev"),
        ("s3://bucket/Test/a.jsonl?region=x", "Test"),
        ("rows.jsonl", ""),
        ("latest.jsonl", ""),
        ("data-00000-of-00002.arrow", ""),
        ("part-00000-of-00002.parquet", ""),
        ("a_test_of_words.jsonl", ""),
    ],
)
def test_split_by_name(path: str, split: str) -> None:
    assert split_named(path) == split


HUB = [
    "hub/data/test-00000-of-00001.parquet",
    "hub/data/train-00000-of-00002.parquet",
    "hub/data/train-00001-of-00002.parquet",
]


@pytest.mark.parametrize("path", ["hub", "hub/data/*.parquet", "hub/**/*.parquet"])
def test_files_of_several_splits_are_refused_or_chosen(path: str) -> None:
    fill(*HUB, "hub/README.md")
    with pytest.raises(DataError, match=rf"'{path.replace('*', '.')[:3]}.* holds several splits \(test, train\)") as error:
        names(path)
    assert error.value.hint == "choose one with `split: train`, or take all of them with `split: all`"
    assert names(path, split="train") == HUB[1:]
    assert names(path, split="test") == HUB[:1]
    assert names(path, split="all") == names(path, any_split=True) == HUB
    with pytest.raises(DataError, match=r"has no split 'dev'\nhint: its splits are: test, train"):
        names(path, split="dev")


@pytest.mark.parametrize(
    "files",
    [
        ["train-1.jsonl", "train-2.jsonl"],
        ["test-00000-of-00001.parquet", "test-00001-of-00002.parquet"],
        ["faq.jsonl", "test.jsonl"],
        ["train.md", "test.md"],
        ["train_sft-00000-of-00001.parquet", "train_gen-00000-of-00001.parquet"],
    ],
)
def test_files_of_one_split_or_none_are_taken(files: list[str]) -> None:
    fill(*(f"rows/{file}" for file in files))
    assert names("rows/*") == [f"rows/{file}" for file in sorted(files)]


def test_an_unset_split_is_not_one_of_the_settings() -> None:
    """The ids of dataset versions are hashes of the settings."""
    sources = [
        resolved(DataConfig.model_validate({"sources": [s]}))["sources"][0]
        for s in ({"path": "a"}, {"path": "a", "split": "b"})
    ]
    assert ["split" in source for source in sources] == [False, True]


# ---------------------------------------------------------------- tables and markers


@pytest.mark.parametrize(
    ("mark", "what"),
    [
        ("_delta_log/00000000000000000000.json", "a Delta table"),
        ("metadata/v1.metadata.json", "an Iceberg table"),
        (".hoodie/hoodie.properties", "a Hudi table"),
    ],
)
@pytest.mark.parametrize(
    "path", ["table", "table/*.parquet", "table/**/*.parquet", "table/day=1/b.parquet", "table/day=*/*"]
)
def test_tables_of_versions_are_refused_by_name(mark: str, what: str, path: str) -> None:
    fill("table/a.parquet", "table/day=1/b.parquet", f"table/{mark}")
    is_delta = what == "a Delta table"
    reason = rf"'table' is {what}, whose files also hold rows that were deleted"
    if is_delta and path == "table":  # which is read, if it can be
        reason = "the log of the Delta table 'table' cannot be read"
    with pytest.raises(DataError, match=reason) as error:
        names(path)
    assert "export the version that you mean as Parquet" in error.value.hint
    assert error.value.hint.startswith("name the folder 'table' itself, or ") == (is_delta and path != "table")


def test_the_metadata_of_an_iceberg_table_is_refused_by_name() -> None:
    fill("table/metadata/v3.metadata.json")
    with pytest.raises(DataError, match=r"v3\.metadata\.json' is the metadata of an Iceberg table"):
        names("table/metadata/v3.metadata.json")


def test_a_folder_named_metadata_is_no_table() -> None:
    fill("rows/a.jsonl", "rows/metadata/about.json")
    assert names("rows/*.jsonl") == ["rows/a.jsonl"]


def test_what_other_programs_leave_is_skipped() -> None:
    rows = ["out/part-00000.parquet", "out/part-00001.parquet"]
    fill(
        *rows,
        "out/_SUCCESS",
        "out/.part-00000.parquet.crc",
        "out/x.crc",
        "out/_metadata",
        "out/_committed_12",
        "out/Thumbs.db",
    )
    fill("out/_temporary/0/part-00002.parquet")
    assert names("out/*") == names("out/**/*") == rows
    assert names("out/*", split="all") == rows
    with pytest.raises(DataError, match="no known format"):  # asked for by its name
        names("out/_SUCCESS")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("a.XLS", "save it as XLSX, or each of its sheets as CSV UTF-8"),
        ("a.avro", "convert it to Parquet"),
        ("a.tar.bz2", "unpack it"),
        ("a.pkl", "reading it could run code"),
        ("a.data", "say which with `format:`"),
    ],
)
def test_formats_that_are_not_read_come_with_the_remedy(name: str, hint: str) -> None:
    fill(name)
    with pytest.raises(DataError, match="is that of no known format") as error:
        names(name)
    assert error.value.hint.startswith(hint)


# ---------------------------------------------------------------- names


def test_names_match_in_any_unicode_form() -> None:
    composed, split = (unicodedata.normalize(form, "Über") for form in ("NFC", "NFD"))
    assert composed != split
    fill(f"{split}.jsonl", f"{composed}-2.jsonl", f"{split}/a.jsonl")
    for form in (composed, split):
        assert names(f"{form}.jsonl") == [f"{split}.jsonl"]
        assert names(f"{form}-2.jsonl") == [f"{composed}-2.jsonl"]
        assert names(f"{form}/*.jsonl") == [f"{split}/a.jsonl"]
    digest = hashlib.sha256(b"x").hexdigest()
    Path("SHA256SUMS").write_text(f"{digest}  {composed}.jsonl\n", encoding="utf-8")
    assert names(f"{composed}.jsonl", checksums="SHA256SUMS") == [f"{split}.jsonl"]


def test_what_nearly_matches_is_named() -> None:
    fill("chat [final] 1.jsonl", "tickets.jsonl")
    assert names("chat [final] 1.jsonl") == ["chat [final] 1.jsonl"]
    assert names("chat [[]final]*.jsonl") == ["chat [final] 1.jsonl"]
    for path, hint in (
        ("chat [final]*.jsonl", "[…] stands for one of the letters in it; write [[] for a bracket: 'chat [[]final]*.jsonl'"),
        ("tickts.jsonl", "did you mean 'tickets.jsonl'?"),
        ("none/*.jsonl", "globs are relative to the current folder"),
    ):
        with pytest.raises(NotFound, match="no file matches") as error:
            names(path)
        assert error.value.hint == hint


def test_checksums_of_names_with_any_line_end() -> None:
    odd = "a\u2028b\x85c.jsonl"
    fill(odd)
    digest = hashlib.sha256(b"x").hexdigest()
    Path("SHA256SUMS").write_bytes(f"\ufeff{digest}  {odd}\r\n".encode())
    assert names("*.jsonl", checksums="SHA256SUMS") == [odd]


@pytest.mark.parametrize(
    ("name", "setting", "value", "format"),
    [
        ("a.parquet", "encoding", "windows-1252", "parquet"),
        ("a.docx", "encoding", "utf-16-le", "docx"),
        ("a.xlsx", "encoding", "windows-1252", "xlsx"),
        ("a.csv", "sheet", "One", "csv"),
    ],
)
def test_settings_that_a_file_cannot_follow_are_refused(name: str, setting: str, value: str, format: str) -> None:
    fill(name, "b.csv")
    with pytest.raises(DataError, match=f"'{name}' is {format}, which has no `{setting}`") as error:
        names("[ab].*" if format != "csv" else name, **{setting: value})
    assert error.value.hint == f"give the files that have one a source of their own, with `{setting}`"


# ---------------------------------------------------------------- folders


def lines_of(path: str, **source: str) -> list[str]:
    return folder_lines(DataConfig.model_validate({"sources": [{"path": path, **source}]}))


def test_a_folder_is_its_files_of_known_kinds(here: Path) -> None:
    fill("corpus/b.jsonl", "corpus/a.md", "corpus/deep/er/c.csv.gz", "corpus/deep/page.HTML", "corpus/x?y.txt")
    fill("corpus/.git/config.yaml", "corpus/.hidden.jsonl", "corpus/_SUCCESS", "corpus/deep/Thumbs.db")
    fill("corpus/photo.PNG", "corpus/other.png", "corpus/LICENSE", "corpus/archive.tar.bz2")
    expected = ["a.md", "b.jsonl", "deep/er/c.csv.gz", "deep/page.HTML", "x?y.txt"]
    for spelled in ("corpus", "corpus/", f"{here}/corpus", f"file://{here}/corpus"):
        assert names(spelled) == [f"corpus/{name}" for name in expected], spelled
    assert lines_of("corpus") == [
        "corpus: 2 text, 1 csv, 1 html, 1 jsonl",
        "corpus: not read, of no known kind: 2 .png, 1 .bz2, 1 LICENSE",
    ]
    assert lines_of("corpus/*.md") == []
    Path("empty").mkdir()
    with pytest.raises(DataError, match="the folder 'empty' holds no files"):
        names("empty")


def test_a_folder_without_known_files_is_refused_with_its_kinds() -> None:
    fill("media/a.png", "media/sub/b.PNG", "media/README")
    with pytest.raises(DataError, match=r"'media' holds 2 \.png, 1 README, and no file of a known kind") as caught:
        names("media")
    assert "JSONL" in (caught.value.hint or "")
    fill("packed/rows.zip", "packed/a.png")
    with pytest.raises(DataError, match=r"1 \.png, 1 \.zip") as caught:
        names("packed")
    assert caught.value.hint == "unpack it, and name the files in it"
    fill(*(f"kinds/f.k{number}" for number in range(30)))
    with pytest.raises(DataError, match="18 more kinds"):
        names("kinds")
    assert names("kinds", format="jsonl") == sorted(f"kinds/f.k{number}" for number in range(30))


def test_links_in_a_folder_are_followed_inside_only() -> None:
    fill("corpus/blobs/0123", "corpus/real.jsonl", "corpus/sub/a.jsonl", "outside/secret.jsonl")
    Path("corpus/named.jsonl").symlink_to("blobs/0123")
    Path("corpus/again.jsonl").symlink_to("real.jsonl")
    Path("corpus/loop").symlink_to(".")
    Path("corpus/sub2").symlink_to("sub")
    assert names("corpus") == ["corpus/named.jsonl", "corpus/real.jsonl", "corpus/sub/a.jsonl"]
    Path("corpus/way-out").symlink_to("../outside")
    with pytest.raises(DataError, match=r"'corpus/way-out' is a link to .*outside', which is not in the folder"):
        names("corpus")
    Path("corpus/way-out").unlink()
    Path("corpus/leak.jsonl").symlink_to("../outside/secret.jsonl")
    with pytest.raises(DataError, match=r"'corpus/leak.jsonl' is a link to"):
        names("corpus")


def test_splits_tables_and_saved_datasets_in_a_folder() -> None:
    fill("corpus/chats_train.jsonl", "corpus/chats_test.jsonl", "corpus/notes.md")
    with pytest.raises(DataError, match="'corpus' holds several splits"):
        names("corpus")
    assert names("corpus", split="train") == ["corpus/chats_train.jsonl", "corpus/notes.md"]
    fill("lake/table/part.parquet", "lake/table/_delta_log/0.json", "lake/a.jsonl")
    with pytest.raises(DataError, match="is a Delta table"):
        names("lake")
    fill("mixed/a.jsonl", "mixed/saved/data-00000-of-00001.arrow", "mixed/saved/dataset_info.json")
    Path("mixed/saved/state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    fill("mixed/app/state.json")  # of some program: no data set is next to it
    assert names("mixed") == ["mixed/a.jsonl", "mixed/app/state.json", "mixed/saved/data-00000-of-00001.arrow"]
    fill("hub/data/train-00000-of-00001.parquet", "hub/README.md")
    assert names("hub") == ["hub/data/train-00000-of-00001.parquet"]  # a folder of the hub, as before
    fill("hub/dataset_infos.json", "hub/LICENSE.txt", "hub/.gitattributes", "hub/data/_SUCCESS", "hub/plot.png")
    assert names("hub") == names("hub", split="train") == ["hub/data/train-00000-of-00001.parquet"]
    assert lines_of("hub") == []


@pytest.mark.parametrize(
    "other", ["faq.jsonl", "notes.md", "data/part-0.parquet", "a/b/c/train.parquet", "LICENSE.csv", "license_rows.parquet"]
)
def test_one_parquet_file_of_a_split_does_not_hide_other_files(other: str) -> None:
    fill("mixed/data/train-00000-of-00001.parquet", f"mixed/{other}", "mixed/README.md")
    expected = ["data/train-00000-of-00001.parquet", other, "README.md"]
    assert names("mixed") == sorted(f"mixed/{name}" for name in expected)
    assert sum(line.startswith("mixed: ") for line in lines_of("mixed")) == 1


def test_what_describes_a_dataset_of_the_hub_is_no_row_and_named() -> None:
    for name in ("clone", "more/clone"):
        fill(f"{name}/data/train.jsonl", f"{name}/dataset_infos.json", f"{name}/LICENSE.md", f"{name}/guide.md")
        Path(name, "README.md").write_text("---\nlicense: mit\n---\n# Rows\n")
    rows = ["clone/data/train.jsonl", "clone/guide.md"]
    assert names("clone") == rows
    assert names("more") == [f"more/{row}" for row in rows]
    assert lines_of("clone") == [
        "clone: 1 jsonl, 1 text",
        "clone: not read, as it describes the dataset: 1 LICENSE.md, 1 README.md, 1 dataset_infos.json",
    ]
    uri = f"file://{Path.cwd()}/clone"
    assert names(uri) == rows
    assert len(names("clone", format="text")) == 5  # every file, as the source asks for
    Path("clone/README.md").write_text("# Rows\n")  # a text, which may be one to learn
    assert names("clone") == ["clone/LICENSE.md", "clone/README.md", *rows]
    fill("texts/a.md", "texts/LICENSE", "texts/dataset_infos.json")
    Path("texts/README.md").write_text("---\ntitle: Texts\n---\n")
    assert names("texts") == ["texts/README.md", "texts/a.md", "texts/dataset_infos.json"]


@pytest.mark.parametrize(
    "content",
    ["{", "[" * 100_000, "[]", "{}", '{"splits": "train"}', '{"_data_files": [{"name": "a"}]}', '{"_data_files": ["a"]}'],
    ids=range(7),
)
def test_state_and_splits_of_other_programs_make_no_saved_dataset(content: str) -> None:
    for place in ("app", "deep/er"):
        for name in ("state.json", "dataset_dict.json", "dataset_info.json", "rows.jsonl"):
            fill(f"{place}/{name}")
            Path(place, name).write_text(content)
    files = ["dataset_dict.json", "dataset_info.json", "rows.jsonl", "state.json"]
    assert names("app") == [f"app/{name}" for name in files]
    assert names("deep") == [f"deep/er/{name}" for name in files]
    assert lines_of("app") == ["app: 3 json, 1 jsonl"]


def test_a_saved_split_that_does_not_list_its_files_is_refused() -> None:
    fill("saved/train/state.json")
    Path("saved/dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match=r"'saved/train' has no state\.json that lists its files of rows") as error:
        names("saved")
    assert error.value.hint == "save the dataset again with save_to_disk"


def test_no_lines_of_a_table_whose_files_are_not_its_rows() -> None:
    fill("table/a.parquet", "table/_delta_log/0.json")
    assert lines_of("table") == []


def test_a_secret_in_a_uri_is_refused_before_the_folder_is_looked_at() -> None:
    with pytest.raises(ConfigError, match="a URI carries a user name or password"):
        lines_of("s3://key:secret@bucket/rows")
