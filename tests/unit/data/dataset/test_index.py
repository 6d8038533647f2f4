"""The index of a dataset version: every record is found where it is, and an index that is not whole is built again."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from fabricated import dataset, record_of, store_at
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge_ray.config.data import Splits
from forge_ray.data.dataset import index, sorted_numbers
from forge_ray.data.dataset.compare import holders
from forge_ray.data.dataset.index import Place, dropped, duplicates, of_subject, places, rows_with
from forge_ray.data.dataset.sorted_numbers import CHUNK, Sorted, write_sorted
from forge_ray.data.dataset.version import SPLITS, read_records, split_of
from forge_ray.errors import ConfigError, DataError, StoreError
from forge_ray.records import DatasetManifest
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = [pytest.mark.unit, pytest.mark.slow]
SUBJECTS = [f"{number:032x}" for number in (1, 2, 1 << 120, (1 << 120) + 1)]  # two pairs alike in their first 32 bits


def place_of(store: Store, manifest: DatasetManifest, record: str) -> Place | None:
    return next(iter(places(store, manifest, [record])), None)


def made(catalog: Catalog, seed: int = 0, count: int = 60, block_rows: int = 3) -> tuple[DatasetManifest, list[list[str]]]:
    """A dataset with rows of up to four records, some of them in several rows and some in none."""
    rng = random.Random(seed)
    records = [record_of(n) for n in range(count)]
    probe = [r.id for r in records]
    trained = [r for r in probe if split_of(bytes.fromhex(r[4:]), Splits()) == 0]
    rows = [rng.choices(trained, k=rng.randint(1, 4)) for _ in range(rng.randint(1, 40))]
    whole = len(rows) // block_rows
    subjects = {record: rng.choice(SUBJECTS) for record in probe if rng.random() < 0.7}
    manifest = dataset(
        catalog,
        records,
        rows,
        block_rows=block_rows,
        shards=[block_rows] * min(2, max(0, whole - 1)),
        parts=rng.choice([1, 2, 8]),
        subjects=subjects,
    )
    return manifest, rows


@given(seed=st.integers(0, 10**6), chunk=st.sampled_from([1, 2, 7, 1 << 16]), block_rows=st.integers(1, 5))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_index_lookups_equal_a_full_scan(
    seed: int, chunk: int, block_rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch, Catalog.open(store_at(tmp_path_factory.mktemp("store"))) as catalog:
        patch.setattr(sorted_numbers, "CHUNK", chunk)
        manifest, rows = made(catalog, seed, block_rows=block_rows)
        store = catalog.store
        by_subject: dict[str, set[str]] = {}
        everywhere, expected = [], {}
        for split in SPLITS:
            for row in read_records(store, manifest, split):
                place = place_of(store, manifest, row["record"])
                assert place is not None
                assert (place.split, place.file, place.line) == (split, row["file"], row["line"])
                inside = [number for number, members in enumerate(rows) if row["record"] in members]
                assert rows_with(store, manifest, [place]) == ({row["record"]: inside} if inside else {})
                everywhere.append(place)
                expected |= {row["record"]: inside} if inside else {}
                if row["subject"]:
                    by_subject.setdefault(row["subject"], set()).add(row["record"])
        asked = [place.record for place in everywhere] + [record_of(n).id for n in range(1000, 1020)]
        random.Random(seed).shuffle(asked)
        assert places(store, manifest, asked) == sorted(everywhere, key=lambda place: place.record)
        assert rows_with(store, manifest, everywhere) == expected
        for subject in SUBJECTS:
            assert of_subject(store, manifest, subject) == sorted(by_subject.get(subject, ()))
        assert of_subject(store, manifest, "f" * 32) == []
        assert place_of(store, manifest, record_of(1000).id) is None


def test_ids_with_equal_prefixes_are_distinguished(tmp_path: Path) -> None:
    """36 bits find candidates; the dataset's rows decide."""
    with Catalog.open(store_at(tmp_path)) as catalog:
        manifest, _ = made(catalog)
        record = read_records(catalog.store, manifest, "train")[0]["record"]
        alike = record[:-1] + ("0" if record[-1] != "0" else "1")
        codes = index._codes(catalog.store, manifest, [alike, record])
        assert codes[alike] == codes[record] != set()
        assert place_of(catalog.store, manifest, alike) is None


def test_dropped_records_name_the_record_kept_instead(tmp_path: Path) -> None:
    with Catalog.open(store_at(tmp_path)) as catalog:
        dropped_id, other, stays = (record_of(n).id for n in (100, 101, 1))
        left_out = [
            (dropped_id, f"near duplicate of {stays}"),
            (dropped_id, f"duplicate of {dropped_id}"),
            (other, "no licence"),
        ]
        manifest = dataset(catalog, [record_of(n) for n in range(20)], dropped=left_out)
        store = catalog.store
        assert [
            (place.record, place.reason, place.kept) for place in dropped(store, manifest, [dropped_id, stays, other])
        ] == [
            (dropped_id, f"near duplicate of {stays}", stays),
            (dropped_id, f"duplicate of {dropped_id}", dropped_id),
            (other, "no licence", ""),
        ]
        assert [(place.record, place.kept) for place in duplicates(store, manifest, [stays, other])] == [(dropped_id, stays)]
        assert [place.kept for place in duplicates(store, manifest, [dropped_id, stays])] == [stays, dropped_id]
        assert place_of(store, manifest, dropped_id) is None
        assert dropped(store, manifest, [stays]) == duplicates(store, manifest, [other]) == []


def damage(store: Store, dataset: str, name: str) -> None:
    path = Path(store.root) / "index" / dataset / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["records.bin", "subjects.bin", "records-fences.npy", "about.json", "MANIFEST.json"])
def test_corrupt_index_is_rebuilt(name: str, tmp_path: Path) -> None:
    with Catalog.open(store_at(tmp_path)) as catalog:
        store = catalog.store
        manifest, _ = made(catalog)
        rows = read_records(store, manifest, "train")
        last = max(rows, key=lambda row: row["record"])  # its entry is in the last bytes
        subject = max(row["subject"] for row in rows if row["subject"])
        index.build(store, manifest)
        before = {path: store.read(path) for path in store.list(f"index/{manifest.id}")}
        expected = of_subject(store, manifest, subject)
        damage(store, manifest.id, name)
        index._open.cache_clear()
        place = place_of(store, manifest, last["record"])
        assert place is not None
        assert place.line == last["line"]
        assert of_subject(store, manifest, subject) == expected
        place_of(store, manifest, record_of(0).id)
        assert {path: store.read(path) for path in store.list(f"index/{manifest.id}")} == before


def test_missing_index_is_rebuilt(tmp_path: Path) -> None:
    with Catalog.open(store_at(tmp_path)) as catalog:
        manifest, _ = made(catalog)
        record = read_records(catalog.store, manifest, "test")[0]["record"]
        assert not catalog.store.exists("index")
        assert place_of(catalog.store, manifest, record) is not None
        catalog.store.delete_dir("index")
        index._open.cache_clear()
        assert place_of(catalog.store, manifest, record) is not None
        size = sum(path.stat().st_size for path in (Path(catalog.store.root) / "index").rglob("records.bin"))
        assert size > 0


@pytest.mark.parametrize("width", [7, 8])
def test_chunk_is_verified_before_use(width: int, tmp_path: Path) -> None:
    store, values = store_at(tmp_path), np.arange(0, 3 << 17, 3, dtype=np.uint64)
    Path(store.root).mkdir(exist_ok=True)
    write_sorted(Path(store.root), "x", values, width)
    whole = Sorted.of(store, "x.bin", width, store.read("x-fences.npy"))

    def within(low: int, high: int) -> list[int]:
        owners, entries = whole.within(np.array([low], np.uint64), high - low)
        assert set(owners.tolist()) <= {0}
        return entries.tolist()

    assert within(7, 12) == [9, 12]
    assert within(0, 0) == [0]
    border = int(values[CHUNK])
    assert within(border - 3, border) == [border - 3, border]
    assert within(int(values[-1]) + 1, (1 << 55)) == []
    owners, entries = whole.within(np.array([7, 9, border - 4], np.uint64), 4)
    assert (owners.tolist(), entries.tolist()) == ([0, 1, 1, 2, 2], [9, 9, 12, border - 3, border])
    bent = bytearray(store.read("x.bin"))
    bent[(CHUNK + 5) * width] += 1
    store.write("x.bin", bytes(bent))
    with pytest.raises(StoreError, match="chunk 1 is not what was written"):
        Sorted(store, "x.bin", width, whole.fences).within(np.array([border], np.uint64), 9)


def test_blocks_beyond_the_entry_range_share_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Catalog.open(store_at(tmp_path)) as catalog:
        monkeypatch.setattr(index, "FIRST_RESERVED", 3)
        manifest, rows = made(catalog, seed=5, block_rows=1)
        assert index._shift(manifest) > 0
        monkeypatch.setattr(index, "FIRST_RESERVED", index.KEPT)  # the codes that are read are those of the build
        monkeypatch.setattr(index, "_shift", lambda manifest: 3)
        for row in read_records(catalog.store, manifest, "train"):
            place = place_of(catalog.store, manifest, row["record"])
            assert place is not None
            inside = [number for number, members in enumerate(rows) if row["record"] in members]
            assert rows_with(catalog.store, manifest, [place]).get(row["record"], []) == inside


def test_invalid_record_ids_are_rejected(tmp_path: Path) -> None:
    with Catalog.open(store_at(tmp_path)) as catalog:
        manifest, _ = made(catalog)
        for text in ("rec_1", "rec_" + "g" * 24, "0" * 24, "ds_0123456789abcdef"):
            with pytest.raises(ConfigError, match="is no record id"):
                place_of(catalog.store, manifest, text)
        broken = dataset(catalog, [record_of(n) for n in range(9)], [["rec_not hex, but of 24 x"]])
        with pytest.raises(DataError, match=f"{broken.id}: a record id or a subject is not hex"):
            index.build(catalog.store, broken)


def test_more_rows_than_an_entry_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MOST_ROWS", 8)
    with Catalog.open(store_at(tmp_path)) as catalog:
        records = [record_of(number) for number in range(9)]
        person = {records[3].id: "ab" * 32}
        with pytest.raises(DataError, match="has 9 records with subjects; the index of people numbers 8"):
            index.build(catalog.store, dataset(catalog, records, subjects=person))
        index.build(catalog.store, dataset(catalog, records[:8], subjects=person, name="fits"))
        index.build(catalog.store, dataset(catalog, records, name="nobody's"))


def test_versions_that_do_not_hold_the_person_are_searched_too(tmp_path: Path) -> None:
    with Catalog.open(Store(str(tmp_path))) as catalog:
        with_subject = dataset(catalog, [record_of(number) for number in range(8)], subjects={record_of(3).id: "ab" * 32})
        without = dataset(catalog, [record_of(number) for number in range(8, 12)], name="others")
        held = holders(catalog.store, [without, with_subject], subjects={with_subject.id: ["ab" * 32], without.id: []})
    assert [(row["dataset"], row["record"]) for row in held] == [(with_subject.id, record_of(3).id)]
