"""The pages about reducers: each class is described once, whatever the number of its names."""

from benchmarks.report.reducers import descriptions


def section(name):
    """The text under the heading of a reducer."""
    return next(part for part in descriptions().split("\n### ") if f"\n`{name}` is " in part)


def test_a_class_with_two_names_is_described_once_and_the_second_says_what_differs():
    released, averaged = section("evit"), section("evit-averaged")
    assert "`evit` is `EViT`." in released and "Keep the ceil(keep·K) patches" in released
    assert "This is the released form" in released
    assert "`evit-averaged` is `EViT(keep, form='averaged')`." in averaged
    assert "Described under [EViT](#evit)." in averaged and "Keep the ceil" not in averaged
    assert "Differs: keep·K is rounded, not rounded up" in averaged


def test_a_name_for_another_place_points_to_the_class_too():
    assert "Described under [class attention](#class-attention)." in section("class-attention-after")
    assert "top R of a_j" in section("class-attention")


def test_a_section_says_what_the_reducer_itself_costs_and_reads():
    divprune, centre = section("divprune"), section("centre-crop")
    assert "\nOwn cost: the cosines between all pairs, and keys that are not there yet.\n" in divprune
    assert "\nOwn cost: none.\n" in centre and "\nNeeds: places.\n" in centre and "Needs:" not in divprune
    assert "Described under [ZOO-Prune, ours](#zoo-prune-ours)." in section("zoo-prune-released")
