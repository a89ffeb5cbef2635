"""What every command writes and says in the same way: whole files, errors of one line."""

import pytest

from experiments.records import files
from experiments.settings.errors import ExperimentError, fail, one_line


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.md"
    files.replace_text(path, "one ± 1\n")
    assert path.read_text(encoding="utf-8") == "one ± 1\n"

    def killed(stream):
        stream.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace(path, killed)
    assert path.read_text(encoding="utf-8") == "one ± 1\n"
    left = tmp_path / files.temporary_name(path.name)
    assert left.read_bytes() == b"half"
    files.replace(path, lambda stream: stream.write(b"two"))  # takes the place of what was left
    assert path.read_bytes() == b"two"
    assert [file.name for file in tmp_path.iterdir()] == ["results.md"]


def test_a_folder_that_is_not_there_is_no_place_for_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.replace_text(tmp_path / "none" / "file", "text")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ExperimentError("two\n  lines"), "two lines"),
        (ValueError(), "ValueError"),
        (OSError(" \n"), "OSError"),
        ("text", "text"),
    ],
)
def test_an_error_is_said_in_one_line_and_ends_the_command(error, text, capsys):
    assert one_line(error) == text
    with pytest.raises(SystemExit) as ended:
        fail(error)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {text}\n")
