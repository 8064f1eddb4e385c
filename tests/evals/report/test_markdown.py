from hybridattn.evals.report.markdown import fenced, recall_cell, table


def test_tables_are_padded():
    assert table(["model", "n"], [["a", "1,000"], ["longer", "2"]]) == "\n".join(
        [
            "| model  |     n |",
            "| ------ | ----: |",
            "| a      | 1,000 |",
            "| longer |     2 |",
        ]
    )


def test_recall_shows_the_range_over_the_seeds():
    assert recall_cell(0.5, [0.5]) == recall_cell(0.5, [0.5, 0.5]) == "0.500"
    assert recall_cell(0.5, [0.25, 0.75]) == "0.500 (0.250-0.750)"


def test_sampled_text_stays_in_its_block_and_shows_control_characters():
    assert fenced("a\n````\n\x1b[31mb\tc") == "`````\na\n````\n\N{REPLACEMENT CHARACTER}[31mb\tc\n`````"
