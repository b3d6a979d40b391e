"""Pictures and captions: WebDataset shards, the embedded benchmark, and the transforms between file and tensor."""
