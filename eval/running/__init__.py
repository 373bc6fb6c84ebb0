"""How a run goes: image by image, shard after shard, alone or among several processes."""
