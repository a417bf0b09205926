"""What an offline run of wandb holds."""

import json
import struct

from wandb.proto import wandb_internal_pb2


def records(path):
    """A log of 32 KiB blocks, in the format of LevelDB, behind a header of 7 bytes."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole of a record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def read(path):
    """({step: what was logged}, the config of the run)."""
    history, config = {}, {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            step = values["_step"]
            history[step] = {n: value for n, value in values.items() if not n.startswith("_")}
        for source in (record.config, record.run.config):
            config |= {item.key: json.loads(item.value_json) for item in source.update}
    return history, config
