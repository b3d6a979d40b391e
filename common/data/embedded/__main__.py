"""`make data`: pack every split that is not there yet."""

from common.data.embedded.module import SPLITS, pack

for split in SPLITS:
    print(pack(split))
