"""Finished work is kept: nothing of another's is pruned, nothing goes beside a living process, no part is lost."""

import errno
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from igpt_lab.app import cli
from igpt_lab.core.storage import Remote, held, lock_of, locks_of, place
from igpt_lab.features import extraction, prepared, upkeep
from igpt_lab.features.manifest import FeatureKey, StoreError, stores_in
from igpt_lab.features.runner import Runner
from igpt_lab.features.store import FeatureStore
from igpt_lab.features.writing import StoreWriter
from igpt_lab.models import loading

QUIET = {"device": "cpu", "progress": False}


@pytest.fixture
def store(tiny, train, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "ROWS", 25)  # 60 rows: 3 parts
    return extraction.extract(tiny, train, store=tmp_path / "stores", **QUIET)


def files(root) -> dict:
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def pruned(root) -> list[bool]:
    return [upkeep.remove(leftover) for leftover in upkeep.leftovers(root)]


def strangers(root, part: bytes) -> list[Path]:
    """Folders that look like a store, and are none or of a format to come."""
    ours = {"key": {"format": 1}, "splits": {}}
    texts = {
        "app/manifest.json": '{"name": "app", "icons": [], "start_url": "/"}',
        "app-01234567/manifest.json": '{"key": "MIIB", "manifest_version": 3}',
        "garbage-01234567/manifest.json": "{",
        "some-01234567/manifest.json": json.dumps(ours),
        "future-01234567/manifest.json": json.dumps({"key": {"format": 2}, "splits": {"train": [None]}}),
        "notes-01234567/manifest.txt": "mine",
        "empty-01234567/train/.keep": "",
        "mine-01234567/train/notes.txt": "mine",
    }
    data = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": [b"x"], "label": [1]}), data)
    parts = {f"{name.split('/')[0]}/train/part-00000-of-00001.parquet": part for name in texts if name[0] != "e"}
    parts |= {"set-01234567/train/part-00000-of-00001.parquet": data.getvalue().to_pybytes()}
    parts |= {"plain/train/part-00000-of-00001.parquet": part, "half-01234567/train/.part-0.tmp": b""}
    for name, content in {**texts, **parts}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return sorted(root / folder for folder in {name.split("/")[0] for name in {**texts, **parts}} - {"plain"})


def test_what_is_not_ours_is_named_and_kept(store, capsys):
    root = store.path.parent
    folders, before = strangers(root, store.part("train", 0).read_bytes()), files(root)
    assert upkeep.leftovers(root) == []
    assert [path for path, why in upkeep.not_ours(root) if why == "was not written by igpt-lab"] == folders
    assert cli.main(["prune", str(root), "--yes"]) == 0
    shown = capsys.readouterr().out
    assert all(f"was not written by igpt-lab  {folder}" in shown for folder in folders) and "nothing to prune" in shown
    assert files(root) == before


def test_a_store_in_pieces_is_ours_by_its_columns_or_its_key(store):
    root = store.path.parent
    begun = root / "begun-01234567"
    shutil.copytree(store.path / "train", begun / "train")
    (begun / "train/.part-00003-of-00004.parquet.ab.tmp").write_bytes(b"half")
    store.part("train", 1).unlink()
    (store.path / "mine.txt").write_text("mine")
    assert {leftover.path for leftover in upkeep.leftovers(root)} == {begun, store.path}
    assert pruned(root) == [True, True] and not begun.exists() and files(store.path) == {
        store.path / "mine.txt": b"mine"
    }  # fmt: skip


def test_stray_files_in_a_store_are_named_and_hide_nothing(store, capsys):
    root = store.path.parent
    strays = ["._manifest.json", ".DS_Store", "train/._part-00000-of-00003.parquet", "train/0000.parquet"]
    strays += ["train/Thumbs.db", "other/part-00000-of-00003.parquet", ".mine.tmp", "train/.part-x.tmp"]
    for name in strays:
        (store.path / name).parent.mkdir(exist_ok=True)
        (store.path / name).write_bytes(b"stray")
    (root / "manifest.json").write_text('{"name": "app"}')
    before = files(root)
    assert {path.relative_to(store.path).as_posix() for path, _ in upkeep.not_ours(root)} == set(strays)
    assert upkeep.list_stores(root)["state"].tolist()[1] == "complete" and upkeep.verify(store.path) == []
    assert FeatureStore.open(store.path).layer("ln_1", 0, "train").shape == (60, 8)
    StoreWriter.create(root, FeatureKey(**store.key), {"train": 3}).close()
    assert upkeep.leftovers(root) == [] and files(root) == before and stores_in(root) == [root, store.path]


def test_a_writer_shows_from_the_beginning_that_it_is_there(store):
    root = store.path.parent
    store.part("train", 1).unlink()
    listed = upkeep.leftovers(root)
    writer = StoreWriter.create(root, FeatureKey(**store.key), {"train": 3})  # it has claimed nothing yet
    before = files(store.path)
    assert any(map(held, locks_of(store.path))) and upkeep.leftovers(root) == []
    assert [upkeep.remove(leftover) for leftover in listed] == [False] and files(store.path) == before
    assert (store.path, "a process uses it, or its lock cannot be opened") in upkeep.not_ours(root)
    writer.close()
    assert locks_of(store.path) == [] and pruned(root) == [True] and not store.path.exists()


def test_prune_looks_again_and_holds_the_store_meanwhile(store, tiny, train, monkeypatch):
    root, good, delete, seen = store.path.parent, files(store.path), upkeep._delete, []
    lock = Path(lock_of(store.path).lock_file)
    monkeypatch.setattr(upkeep, "_delete", lambda *a: seen.append(held(lock)) or delete(*a))
    store.part("train", 1).unlink()
    listed = upkeep.leftovers(root)
    assert [leftover.what for leftover in listed] == ["incomplete store"]
    extraction.extract(tiny, train, store=root, **QUIET)  # another process finishes it
    assert [upkeep.remove(leftover) for leftover in listed] == [True] and files(store.path) == good and seen == [True]
    shutil.rmtree(store.path)  # or prunes it
    assert [upkeep.remove(leftover) for leftover in listed] == [True]
    with lock_of(store.path):  # or writes this very moment
        assert [upkeep.remove(leftover) for leftover in listed] == [False]


def test_a_repair_replaces_and_removes_nothing_first(store, monkeypatch):
    store.part("train", 1).write_bytes(b"bad")
    before = files(store.path)

    def stopped(*_):
        assert files(store.path) == before
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "over", stopped)
    with pytest.raises(KeyboardInterrupt):
        upkeep.repair(store.path, upkeep.verify(store.path))
    assert files(store.path) == before and locks_of(store.path) == []


@pytest.mark.parametrize("wrong", ["bytes", "columns"])
def test_a_part_that_another_process_mended_is_left(wrong, store, monkeypatch):
    part, manifest = store.part("train", 1), store.path / "manifest.json"
    good, listed = part.read_bytes(), manifest.read_bytes()
    if wrong == "bytes":
        part.write_bytes(b"bad")
    else:
        pq.write_table(pq.read_table(part).drop_columns(["label"]), part)
        about = json.loads(listed)
        about["splits"]["train"][1]["sha256"] = upkeep.digest(part)
        manifest.write_text(json.dumps(about))
    problems, load = upkeep.verify(store.path), loading.load_model

    def meanwhile(*arguments, **named):
        part.write_bytes(good), manifest.write_bytes(listed)
        return load(*arguments, **named)

    monkeypatch.setattr(loading, "load_model", meanwhile)
    monkeypatch.setattr(Runner, "over", lambda *_: pytest.fail("computed again"))
    assert problems and upkeep.repair(store.path, problems).path == store.path
    assert part.read_bytes() == good and upkeep.verify(store.path) == []


def test_parts_of_another_length_are_used_and_completed(store, tiny, train, tmp_path, monkeypatch):
    good, root = files(store.path), store.path.parent
    monkeypatch.setattr(prepared, "ROWS", 20)
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "over", lambda *_: pytest.fail("computed again"))
        assert extraction.extract(tiny, train, store=root, **QUIET).path == store.path
    for number in (0, 2):
        store.part("train", number).unlink()
        extraction.extract(tiny, train, store=root, **QUIET)
        assert files(store.path) == good
    store.part("train", 2).write_bytes(b"bad")
    upkeep.repair(store.path, upkeep.verify(store.path))
    assert files(store.path) == good


def test_parts_of_unequal_length_are_used_and_never_lost(store, tiny, train, monkeypatch):
    root, table = store.path.parent, {layer: store.layer("ln_1", layer, "train") for layer in range(4)}
    shutil.rmtree(store.path)
    writer = StoreWriter.create(root, FeatureKey(**store.key), {"train": 2})
    for number, rows in ((0, slice(0, 10)), (1, slice(10, 60))):
        features = {f"ln_1.{layer}": values[rows] for layer, values in table.items()}
        writer.write_part("train", number, train.index[rows], train.labels[rows], features, {})
    writer.close()
    good = files(store.path)
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "over", lambda *_: pytest.fail("computed again"))
        same = extraction.extract(tiny, train, store=root, **QUIET)
    assert files(store.path) == good and same.index("train").tolist() == list(range(60))
    for rows in (25, 30):  # 3 parts, or 2 of other rows
        monkeypatch.setattr(prepared, "ROWS", rows)
        writer.part("train", 1).write_bytes(b"bad")
        before = files(store.path)
        with pytest.raises(StoreError, match="delete it and extract again"):
            extraction.extract(tiny, train, store=root, **QUIET)
        assert files(store.path) == before


def test_an_address_of_this_disk_is_a_path(tmp_path, monkeypatch, tiny, train):
    monkeypatch.setenv("HOME", str(tmp_path))
    spelt = (f"file://{tmp_path}/a%20b", f"file://localhost{tmp_path}/a b", f"file:{tmp_path}/a b", "~/a b")
    assert [place(name) for name in spelt] == [tmp_path / "a b"] * 4 and place(Path("~/x")) == tmp_path / "x"
    for wrong in ("file://elsewhere/x", "~nosuchuser/x", "nowhere://x"):
        with pytest.raises(ValueError, match="expected a path|no user of this name"):
            place(wrong)
    monkeypatch.chdir(tmp_path)
    for name in (f"file://{tmp_path}/stores", "~/stores"):
        store = extraction.extract(tiny, train, store=name, **QUIET)
        assert store.path.parent == tmp_path / "stores" and not isinstance(store.path, Remote)
        assert FeatureStore.open(f"{name}/{store.path.name}").splits == ["train"]
        assert upkeep.list_stores(name)["state"].tolist() == ["complete"] and upkeep.leftovers(name) == []
    assert {path.name for path in tmp_path.iterdir()} == {"stores"}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_disk_without_locks_allows_one_writer(code, tiny, train, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(prepared, "ROWS", 25)
    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(
        UserWarning, match="has no locks .*; continuing without a lock, so no other process may write into this"
    ):
        store = extraction.extract(tiny, train, store=tmp_path, **QUIET)
    assert upkeep.verify(store.path) == [] and list(tmp_path.glob(".*.lock")) == []
    (tmp_path / f".{store.path.name}.lock").touch()
    assert upkeep.leftovers(tmp_path) == [] and upkeep.list_stores(tmp_path)["state"].tolist() == ["complete"]


def test_a_lock_that_is_not_ours_to_open_stops_nobody(store, tiny, train, monkeypatch):
    root, theirs, opened = store.path.parent, lock_of(store.path).lock_file, os.open
    Path(theirs).touch()
    other = root / ".gone-01234567.lock"
    other.touch()

    def refused(path, *arguments, **named):
        if str(path) in (theirs, str(other)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **named)

    store.part("train", 1).unlink()
    monkeypatch.setattr(os, "open", refused)
    assert upkeep.leftovers(root) == [] and held(other) and len(upkeep.list_stores(root)) == 1
    assert [path for path, why in upkeep.not_ours(root) if "lock cannot be opened" in why] == [store.path]
    with pytest.warns(UserWarning, match="cannot be locked by this user .*; continuing without"):
        extraction.extract(tiny, train, store=root, **QUIET)
    assert upkeep.verify(store.path) == [] and Path(theirs).exists()


def test_one_unreadable_manifest_stops_nobody(store, tiny, train, monkeypatch):
    root, read = store.path.parent, Path.read_text
    locked = root / "locked-01234567/manifest.json"
    locked.parent.mkdir()
    locked.write_text("{}")

    def refused(path, *arguments, **named):
        if path == locked:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path, *arguments, **named)

    monkeypatch.setattr(Path, "read_text", refused)
    states = upkeep.list_stores(root)["state"].tolist()
    assert states == [f"{locked} cannot be read: Permission denied", "complete"]
    assert (locked.parent, "was not written by igpt-lab") in upkeep.not_ours(root) and upkeep.leftovers(root) == []
    new = extraction.extract(tiny, train, store=root, pool="max", **QUIET)
    assert upkeep.verify(new.path) == [] and locked.exists()


def test_a_file_that_cannot_be_deleted_stops_no_other(store, monkeypatch, capsys):
    root, unlink = store.path.parent, Path.unlink
    left = [store.path / name for name in (".manifest.json.a.tmp", ".manifest.json.b.tmp")]
    for file in left:
        file.touch()

    def refused(path, *arguments, **named):
        if path == left[0]:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return unlink(path, *arguments, **named)

    monkeypatch.setattr(Path, "unlink", refused)
    assert cli.main(["prune", str(root), "--yes"]) == 0
    assert "kept  [Errno 13] Permission denied" in capsys.readouterr().out
    assert [file.exists() for file in left] == [True, False]


def test_a_writer_s_lock_goes_with_it(tmp_path, store):
    key = FeatureKey(**store.key)
    writer = StoreWriter.create(tmp_path, key, {"train": 3})
    assert len(list(tmp_path.glob(".*.writer-*.lock"))) == 1
    del writer
    assert list(tmp_path.glob(".*.lock")) == []
    left = tmp_path / f".{key.folder()}.writer-01234567.lock"  # of a killed one
    left.touch()
    with FileLock(tmp_path / f".{key.folder()}.writer-89abcdef.lock"):
        assert [leftover.path for leftover in upkeep.leftovers(tmp_path)] == [left]
        StoreWriter.create(tmp_path, key, {"train": 3}).close()
        assert not left.exists() and len(locks_of(tmp_path / key.folder())) == 1


@pytest.mark.parametrize("link", ["tokens", "tokens/set-01234567", "tokens/set-01234567/.part-0.tmp"])
def test_prune_follows_no_link_among_the_tokens(link, tmp_path):
    home, root = tmp_path / "home", tmp_path / "stores"
    mine = home / "set-01234567/.part-0.tmp"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    os.utime(mine, (0, 0))
    (root / link).parent.mkdir(parents=True)
    (root / link).symlink_to({"tokens": home, "tokens/set-01234567": mine.parent}.get(link, mine))
    dangling = root / "tokens/other-01234567/.part-1.tmp"
    dangling.parent.mkdir()
    dangling.symlink_to(tmp_path / "nowhere")
    assert cli.main(["prune", str(root), "--yes"]) == 0
    assert mine.read_bytes() == b"mine" and (root / link).is_symlink() and dangling.is_symlink()


def test_a_repair_writes_into_no_other_folder(store, tmp_path):
    mine = tmp_path / "mine" / store.part("train", 1).name
    shutil.move(store.path / "train", mine.parent)
    mine.write_bytes(b"mine")
    (store.path / "train").symlink_to(mine.parent)
    with pytest.raises(StoreError, match="train is a link, so parts would go into another folder"):
        upkeep.repair(store.path, upkeep.verify(store.path))
    assert mine.read_bytes() == b"mine" and not any(file.name.endswith(".tmp") for file in mine.parent.iterdir())


def test_prune_waits_for_no_pipe(store, monkeypatch):
    file = store.path / "manifest.json"
    file.unlink()
    os.mkfifo(file)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("would wait"))
    assert upkeep.leftovers(store.path.parent) == []
    assert upkeep.not_ours(store.path.parent) == [(store.path, "was not written by igpt-lab")]
