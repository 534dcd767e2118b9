"""cache: makes the cache of a corpus before training, and spares ranks the search for recordings.

    python -m lab.cache --data librispeech --size base     the flags of cdslm.py; needs no GPU

Training makes the cache by itself; on a cluster, where GPUs would wait for it, run this first, with
the same CDSLM_CACHE. Under torchrun rank 0 searches the folder and notes in OUT/shards.json what it
found. The other ranks open that; a rank on a node that does not see those files searches itself.
"""
import json
from pathlib import Path

from cdslm import (Corpus, UserError, cli, config_parser, open_corpus, open_shard, replacing,
                   to_config)

INDEX = "shards.json"


def keep_index(folder, corpus):
    """Note the shards of a corpus in a run folder."""
    stems = [shard["stem"] for shard in corpus.shards]
    with replacing(Path(folder) / INDEX) as temporary:
        temporary.write_text(json.dumps({"contents": corpus.contents, "shards": stems}))


def indexed(config):
    """The corpus that rank 0 has opened; None where its files are not to be seen."""
    try:
        index = json.loads((Path(config.out) / INDEX).read_text())
        shards = [open_shard(stem) for stem in index["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    window = config.ctx_frames + config.gen_frames
    return Corpus(shards, window, index["contents"]) if all(shards) else None


def main():
    arguments = config_parser(__doc__).parse_args()
    if arguments.data == "toy":
        raise UserError("--data FOLDER is missing: toy speech is made in a minute, by training")
    corpus = open_corpus(to_config(arguments))
    folders = dict.fromkeys(str(Path(shard["stem"]).parent) for shard in corpus.shards)
    print("the cache is in", *folders)


if __name__ == "__main__":
    cli(main, resumable=True)
