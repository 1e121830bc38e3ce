"""Images and stores on an S3 server of this machine: the same bytes as on its disk."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from igpt_lab.core.storage import Remote, place
from igpt_lab.features import prepared
from igpt_lab.features.extraction import extract, extract_share
from igpt_lab.features.manifest import StoreError, stores_in
from igpt_lab.features.on_cluster import extract_on_cluster
from igpt_lab.features.store import FeatureStore
from igpt_lab.images.loading import load_images

boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
LOCAL = {"device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def bucket():
    """The address of an empty bucket, which this process and its children reach."""
    with pytest.MonkeyPatch.context() as patch:
        served = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        served.start()
        address = "http://{}:{}".format(*served.get_host_and_port())
        keys = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in {**keys, "AWS_ENDPOINT_URL": address, "AWS_EC2_METADATA_DISABLED": "true"}.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=address).create_bucket(Bucket="lab")
        yield "s3://lab"
        served.stop()


@pytest.fixture
def sets(bucket, tiny_images, tmp_path):
    """The same Parquet files on the disk and in the bucket: their places."""
    here, there = tmp_path / "shades", place(f"{bucket}/sets/shades")
    for split in ("train", "test"):
        folder = load_images(tiny_images, split)
        cells = [{"bytes": folder._encoded(i)[0], "path": None} for i in range(len(folder))]
        data = pa.BufferOutputStream()
        pq.write_table(pa.table({"image": cells, "label": folder.labels}), data)
        name = f"{split}-00000-of-00001.parquet"
        here.mkdir(exist_ok=True)
        (here / name).write_bytes(data.getvalue().to_pybytes())
        (there / name).put(data.getvalue().to_pybytes())
    return here, str(there)


def content(store):
    parts = [store.part(split, n) for split in store.splits for n in range(len(store.manifest["splits"][split]))]
    return [path.read_bytes() for path in parts]


@pytest.mark.parametrize("engine", [extract, extract_on_cluster])
def test_images_and_store_in_a_bucket_have_the_bytes_of_the_disk(
    engine, tiny_folder, sets, bucket, tmp_path, monkeypatch
):
    monkeypatch.setattr(prepared, "ROWS", 25)
    here, there = ([load_images(name, split) for split in ("train", "test")] for name in sets)
    whole = extract(tiny_folder, here, store=tmp_path / "stores", **LOCAL)
    address = f"{bucket}/{engine.__name__}"
    store = engine(tiny_folder, there, store=address, **LOCAL)
    assert isinstance(store.path, Remote) and str(store.path) == f"{address}/{whole.path.name}"
    assert content(store) == content(whole) and store.manifest["splits"] == whole.manifest["splits"]
    assert [str(path) for path in stores_in(address)] == [str(store.path)]
    np.testing.assert_array_equal(
        FeatureStore.open(str(store.path)).layer("ln_1", 2, "test"), whole.layer("ln_1", 2, "test")
    )
    before = store.part("train", 1).info().mtime, store.part("train", 0).read_bytes()
    store.part("train", 0).put(b"damaged")
    with pytest.raises(StoreError, match="s3://lab/.*part-00000-of-00003.parquet is missing or not as listed"):
        FeatureStore.open(str(store.path))
    again = extract(tiny_folder, there, store=address, **LOCAL)
    assert (again.part("train", 1).info().mtime, again.part("train", 0).read_bytes()) == before


def test_what_cannot_be_done_is_told(tiny, sets, bucket):
    images = load_images(sets[1], "test")
    with pytest.raises(ValueError, match="needs locks, and s3://lab/x is on an object store; extract_on_cluster"):
        extract_share(tiny, images, store=f"{bucket}/x", share=(1, 2), **LOCAL)
    with pytest.raises(ValueError, match="has no split 'dev'; it has test, train"):
        load_images(sets[1], "dev")
    with pytest.raises(ValueError, match="expected a path, s3://bucket"):
        place("nowhere://bucket")
