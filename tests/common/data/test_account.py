"""The account: its counts, its line, its form in result files."""

from common.data.account import IGNORED, REASONS, Account, Unusable


def example():
    account = Account(delivered=7)
    account.reject("s0-3", Unusable("no caption"))
    account.reject("0.tar", Unusable("damaged shard", "cut"), 2)
    account.ignore("system file", "._x.jpg")
    return account


def test_what_is_read_is_delivered_or_rejected():
    account = example()
    assert (account.read, account.delivered, account.bad) == (10, 7, 3)
    assert account.to_dict() == {
        "read": 10,
        "delivered": 7,
        "rejected": {"damaged shard": 2, "no caption": 1},
        "ignored": {"system file": 1},
    }


def test_the_line():
    assert str(example()) == (
        "samples: 10 read, 7 delivered, 3 rejected (2 damaged shard, first 0.tar; 1 no caption, first s0-3), "
        "1 files ignored (1 system file, first ._x.jpg)"
    )


def test_accounts_of_several_readers_are_added():
    total = Account.from_counts(example().counts())
    total.add(example())
    assert total.to_dict()["rejected"] == {"damaged shard": 4, "no caption": 2} and total.read == 20
    assert len(example().counts()) == 1 + len(REASONS) + len(IGNORED)
