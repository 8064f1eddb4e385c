from hybridattn.measure.markdown import fenced, table


def test_tables_are_padded():
    assert table(["model", "n"], [["a", "1,000"], ["longer", "2"]]) == "\n".join(
        [
            "| model  |     n |",
            "| ------ | ----: |",
            "| a      | 1,000 |",
            "| longer |     2 |",
        ]
    )


def test_bars_stay_in_their_cells():
    assert table(["a", "b"], [["x|y", "1"]]).endswith("| x\\|y | 1 |")


def test_sampled_text_stays_in_its_block_and_shows_control_characters():
    assert fenced("a\n````\n\x1b[31mb\tc") == "`````\na\n````\n\N{REPLACEMENT CHARACTER}[31mb\tc\n`````"
