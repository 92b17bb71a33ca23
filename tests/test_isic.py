"""Tables and folders of images as they come."""

from pathlib import Path

import pytest
from conftest import jpeg

from skinsynth.data import isic
from skinsynth.data.captions import phrases
from skinsynth.data.isic import Row
from skinsynth.errors import UserError

HEADER = "image_name,patient_id,lesion_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target"


def csv(tmp_path: Path, *lines: str, header: str = HEADER) -> Path:
    path = tmp_path / "metadata.csv"
    path.write_text("\n".join((header, *lines)) + "\n")
    return path


def test_reads_the_columns_and_leaves_the_unknown_empty(tmp_path: Path) -> None:
    rows, aside = isic.read_metadata(csv(tmp_path, "ISIC_1.jpg,IP_1,IL_1,Female,60.0,upper extremity,melanoma,malignant,1",
                                         "ISIC_2,,NA,,,,unknown,benign,"))
    assert rows == [Row("ISIC_1", 1, "IP_1", "IL_1", "female", 60, "upper extremity", "melanoma"), Row("ISIC_2", 0, diagnosis="unknown")]
    assert aside == []


def test_tolerates_bom_crlf_and_the_columns_of_isic_cli(tmp_path: Path) -> None:
    path = tmp_path / "cli.csv"
    path.write_bytes(b"\xef\xbb\xbfisic_id,anatom_site_general,age_approx,diagnosis_1,diagnosis_2,diagnosis_3\r\n"
                     b'ISIC_1,"head/neck",45,Malignant,Malignant melanocytic,"Melanoma, NOS"\r\nISIC_2,,,Indeterminate,,\r\n')
    rows, aside = isic.read_metadata(path)
    assert rows == [Row("ISIC_1", 1, age=45, site="head/neck", diagnosis="melanoma")]
    assert [a["key"] for a in aside] == ["ISIC_2"]
    assert "unknown target" in aside[0]["reason"]


@pytest.mark.parametrize(("site", "words"), [("Head and neck", "on the head or neck"), ("Trunk", "on the trunk"),
                                             ("Upper extremity", "on the upper extremity"), ("Anogenital region", "in the anogenital region")])
def test_the_sites_of_the_archive_since_2026(tmp_path: Path, site: str, words: str) -> None:
    (found,), _ = isic.read_metadata(csv(tmp_path, f"ISIC_1,{site},Anything finer,Benign", header="isic_id,anatom_site_1,anatom_site_2,diagnosis_1"))
    assert found.site == site.lower()
    assert phrases(found)["site"] == words


@pytest.mark.parametrize(("header", "missing"), [("image_name,sex", "'target'"), ("name,target", "'image_name'")])
def test_a_missing_column_is_named_with_the_file_and_what_there_is(tmp_path: Path, header: str, missing: str) -> None:
    with pytest.raises(UserError) as caught:
        isic.read_metadata(csv(tmp_path, "a,b", header=header))
    assert missing in str(caught.value)
    assert "metadata.csv" in str(caught.value)
    assert header.split(",")[1] in str(caught.value)
    assert ("rename it to image_name" in str(caught.value)) == (missing == "'image_name'")


OFFICIAL = {  # header as published, a row, and what is read of it
    "lesion_id,image_id,dx,dx_type,age,sex,localization": ("HAM_0000118,ISIC_0027419,bkl,histo,80.0,male,scalp",
                                                           Row("ISIC_0027419", 0, None, "HAM_0000118", "male", 80, "scalp", "benign keratosis")),
    "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset": ("HAM_0005678,ISIC_0031023,akiec,histo,60.0,unknown,unknown,vidir_modern",
                                                                   Row("ISIC_0031023", 1, None, "HAM_0005678", None, 60, None, "actinic keratosis")),
    "isic_id,malignant": ("ISIC_0015670,1.0", Row("ISIC_0015670", 1)),  # 2024
    "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK": ("ISIC_0000002,0.0,0.0,0.0,0.0,0.0,0.0,0.0,1.0,0.0",  # 2019
                                                Row("ISIC_0000002", 1, diagnosis="squamous cell carcinoma")),
    "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC": ("ISIC_0024306,0.0,1.0,0.0,0.0,0.0,0.0,0.0", Row("ISIC_0024306", 0, diagnosis="nevus")),  # 2018
    "image_id,melanoma,seborrheic_keratosis": ("ISIC_0000002,1.0,0.0", Row("ISIC_0000002", 1, diagnosis="melanoma")),  # 2017
    "image_name,patient_id,lesion_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target": (
        "ISIC_2637011,IP_7279968,IL_7972535,male,45.0,head/neck,unknown,benign,0",
        Row("ISIC_2637011", 0, "IP_7279968", "IL_7972535", "male", 45, "head/neck", "unknown")),  # 2020
}


@pytest.mark.parametrize("header", OFFICIAL)
def test_the_official_tables_are_read_as_published(tmp_path: Path, header: str) -> None:
    line, wanted = OFFICIAL[header]
    assert isic.read_metadata(csv(tmp_path, line, header=header)) == ([wanted], [])


def test_classes_that_no_table_says_or_that_are_unknown_are_set_aside(tmp_path: Path) -> None:
    lines = ["a,0,0,0,0,0,0,0,0,1.0", "b,0,0,0,0,0,0,0,0,0", "c,1.0,1.0,0,0,0,0,0,0,0", "d,0,0,0,1,0,0,0,0,0"]
    rows, aside = isic.read_metadata(csv(tmp_path, *lines, header="image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK"))
    assert rows == [Row("d", 1, diagnosis="actinic keratosis")]
    assert [(a["key"], a["reason"].split(" (")[0]) for a in aside] == [("a", "unknown target 'UNK'"), ("b", "unknown target"),
                                                                      ("c", "unknown target 'mel+nv'")]
    rows, aside = isic.read_metadata(csv(tmp_path, "a,0.0,0.0", "b,0.0,1.0", header="image_id,melanoma,seborrheic_keratosis"))
    assert [(r.target, r.diagnosis) for r in rows] == [(0, "nevus"), (0, "seborrheic keratosis")]
    rows, aside = isic.read_metadata(csv(tmp_path, "a,xyz", header="image_id,dx"))
    assert (rows, aside[0]["reason"]) == ([], "unknown target 'xyz' (expected 0 or 1)")


def test_a_target_of_ones_own_counts_before_a_tables_code(tmp_path: Path) -> None:
    """Where its class is a matter of convention."""
    for column, value in (("target", "0"), ("label", "0"), ("benign_malignant", "benign")):
        rows, _ = isic.read_metadata(csv(tmp_path, f"a,akiec,{value}", "b,akiec,", header=f"image_id,dx,{column}"))
        assert rows == [Row("a", 0, diagnosis="actinic keratosis"), Row("b", 1, diagnosis="actinic keratosis")]


CONTRADICTIONS = {  # header, row, and what is said of it
    "image_id,dx,target": ("a,mel,0", "target 0 contradicts 'mel'"),
    "image_id,dx,benign_malignant": ("a,nv,malignant", "target malignant contradicts 'nv'"),
    "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK,target": ("a,1,0,0,0,0,0,0,0,0,0", "target 0 contradicts 'mel'"),
    "image_name,target,label": ("a,1,0", "target 1 contradicts '0'"),
    "image_name,benign_malignant,diagnosis_1": ("a,malignant,Benign", "target malignant contradicts 'Benign'"),
    "image_name,target,benign_malignant,diagnosis_1": ("a,1,,Benign", "target 1 contradicts 'Benign'"),
}


@pytest.mark.parametrize("header", CONTRADICTIONS)
def test_a_row_whose_columns_contradict_is_set_aside_whichever_they_are(tmp_path: Path, header: str) -> None:
    line, reason = CONTRADICTIONS[header]
    assert isic.read_metadata(csv(tmp_path, line, header=header)) == ([], [{"key": "a", "reason": reason}])


def test_columns_that_say_neither_contradict_nothing(tmp_path: Path) -> None:
    rows, aside = isic.read_metadata(csv(tmp_path, "a,1,melanoma,Indeterminate", "b,0,5,Benign", header="image_name,target,label,diagnosis_1"))
    assert ([row.target for row in rows], aside) == ([1, 0], [])


def test_the_tables_of_2016_have_no_header_and_those_of_2019_are_two(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no header: its first line is isic_0000000, benign; download .* with isic-cli, or give it a header"):
        isic.read_metadata(csv(tmp_path, "ISIC_0000001,benign", header="ISIC_0000000,benign"))
    with pytest.raises(UserError, match="join them by the image's name, or download the metadata with isic-cli"):
        isic.read_metadata(csv(tmp_path, "ISIC_0000000,55,anterior torso,,female", header="image,age_approx,anatom_site_general,lesion_id,sex"))


def test_only_dermoscopic_images_are_taken_where_the_archive_says_what_they_are(tmp_path: Path) -> None:
    header = "isic_id,image_type,diagnosis_1"
    lines = ["a,dermoscopic,Benign", "b,clinical: overview,Benign", "c,,Benign", "d,TBP tile: close-up,Benign"]
    rows, aside = isic.read_metadata(csv(tmp_path, *lines, header=header))
    assert [r.image_name for r in rows] == ["a", "c"]
    assert aside == [{"key": "b", "reason": "not dermoscopic: image_type is 'clinical: overview'"},
                     {"key": "d", "reason": "not dermoscopic: image_type is 'TBP tile: close-up'"}]
    with pytest.raises(UserError, match=r"no image is dermoscopic \(TBP tile: close-up, clinical: overview\).*remove the column"):
        isic.read_metadata(csv(tmp_path, lines[1], lines[3], header=header))


def test_synthetic_images_are_no_real_ones(tmp_path: Path) -> None:
    """As export writes them, and merged with the real ones."""
    rows, aside = isic.read_metadata(csv(tmp_path, "a,0,real", "b,1,synthetic", "c,1,", "d,1,Barcelona", header="image_name,target,origin"))
    assert [row.image_name for row in rows] == ["a", "c", "d"]
    assert aside == [{"key": "b", "reason": "not real: origin is 'synthetic'"}]
    with pytest.raises(UserError, match=r"data\.metadata: by the column origin of .* no image is real \(synthetic\): give them as data\.synthetic"):
        isic.read_metadata(csv(tmp_path, "b,1,synthetic", header="image_name,target,origin"))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="more than one column 'target'"):
        isic.read_metadata(csv(tmp_path, "a,0,1", header="image_name,target,Target"))
    rows, _ = isic.read_metadata(csv(tmp_path, "a,0,,", header="image_name,target,,"))  # as spreadsheets leave them
    assert rows == [Row("a", 0)]


def test_a_row_with_more_fields_than_the_header_shifts_no_value(tmp_path: Path) -> None:
    """An unquoted comma: the site's second half would be the target's neighbour, and every value after it another column's."""
    header = "image_name,anatom_site_general_challenge,patient_id,target"
    lines = ["a,trunk,IP_1,0", "b,head, neck,IP_2,1", "c,trunk,IP_3,1,, "]
    with pytest.raises(UserError, match=r'data\.metadata: line 3 of .*metadata.csv has more fields than the header .*in quotation marks'):
        isic.read_metadata(csv(tmp_path, *lines, header=header))
    rows, aside = isic.read_metadata(csv(tmp_path, lines[0], lines[1].replace("head, neck", '"head, neck"'), lines[2], header=header))
    assert ([row.patient_id for row in rows], aside) == (["IP_1", "IP_2", "IP_3"], [])


def test_wrong_metadata_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.csv does not exist"):
        isic.read_metadata(tmp_path / "nowhere.csv")
    with pytest.raises(UserError, match="no rows"):
        isic.read_metadata(csv(tmp_path))
    (tmp_path / "table.xlsx").write_bytes(b"PK\x03\x04\xff\xfe\x00")
    with pytest.raises(UserError, match="not a CSV in UTF-8"):
        isic.read_metadata(tmp_path / "table.xlsx")


def test_unknown_targets_and_duplicated_ids_are_set_aside_with_the_reason(tmp_path: Path) -> None:
    rows, aside = isic.read_metadata(csv(tmp_path, "A,,,,,,,benign,0", "B,,,,,,,benign,2", "C,,,,,,,benign,1", "D,,,,,,,,", "A,,,,,,,benign,0",
                                         "E,,,male,,,,benign,0", "E,,,female,,,,benign,0", "../x,,,,,,,benign,0"))
    assert [r.image_name for r in rows] == ["A"]
    reasons = {(a["key"], a["reason"].split(" (")[0]) for a in aside}
    assert reasons == {("B", "unknown target '2'"), ("C", "target 1 contradicts 'benign'"), ("D", "unknown target"), ("A", "duplicated id"),
                       ("E", "duplicated id with rows that differ"), ("../x", "the image name may hold letters, digits, '_' and '-' only")}
    assert len(aside) == 7  # E twice


def test_dreambooth_folders(tmp_path: Path) -> None:
    for folder, names in (("melanoma", ["one (1).jpg", "b.png", "b.jpg"]), ("nevus", ["b.jpg"])):
        (tmp_path / folder).mkdir()
        for name in names:
            jpeg(tmp_path / folder / name)
    rows, aside = isic.read_dreambooth(tmp_path / "melanoma", tmp_path / "nevus")
    assert {(r.image_name, r.target, r.diagnosis) for r in rows} == {
        ("melanoma_b", 1, "melanoma"), ("melanoma_b-2", 1, "melanoma"), ("melanoma_one__1_", 1, "melanoma"), ("nevus_b", 0, "nevus")}
    assert not aside
    assert all(Path(r.file or "").is_file() for r in rows)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"class_data_dir.*holds no image"):
        isic.read_dreambooth(tmp_path / "melanoma", tmp_path / "empty")


def test_dreambooth_names_differ_and_what_is_no_file_is_set_aside(tmp_path: Path) -> None:
    for folder, names in (("melanoma", ["a-2.jpg", "a.jpg", "a.png", "a.jpeg", "a-3.png"]), ("nevus", ["b.jpg"])):
        (tmp_path / folder).mkdir()
        for name in names:
            jpeg(tmp_path / folder / name)
    (tmp_path / "nevus/folder.jpg").mkdir()
    (tmp_path / "nevus/link.jpg").symlink_to(tmp_path / "gone.jpg")
    rows, aside = isic.read_dreambooth(tmp_path / "melanoma", tmp_path / "nevus")
    assert {(r.image_name, Path(r.file or "").name) for r in rows} == {
        ("melanoma_a-2", "a-2.jpg"), ("melanoma_a-3", "a-3.png"), ("melanoma_a", "a.jpeg"), ("melanoma_a-4", "a.jpg"), ("melanoma_a-5", "a.png"),
        ("nevus_b", "b.jpg")}
    assert aside == [{"key": f"nevus_{name}", "reason": "not a file (a folder, or a link to nothing)"} for name in ("folder", "link")]


def test_dreambooth_images_in_folders_within_are_told(tmp_path: Path) -> None:
    for name in ("melanoma/a.jpg", "melanoma/2019/b.jpg", "melanoma/2019/more/c.png", "melanoma/nevus/d.jpg", "melanoma/nevus/old/e.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        jpeg(tmp_path / name)
    rows, aside = isic.read_dreambooth(tmp_path / "melanoma", tmp_path / "melanoma/nevus")  # the one folder within the other
    assert [(row.image_name, row.target) for row in rows] == [("melanoma_a", 1), ("nevus_d", 0)]
    assert [item["key"] for item in aside] == ["melanoma/2019/b.jpg", "melanoma/2019/more/c.png", "nevus/old/e.jpg"]
    assert {item["reason"] for item in aside} == {"in a folder within its class's folder: put it beside the others"}
    (tmp_path / "melanoma/a.jpg").unlink()
    with pytest.raises(UserError, match=r"instance_data_dir.*holds no image .*folders within it aside"):
        isic.read_dreambooth(tmp_path / "melanoma", tmp_path / "melanoma/nevus")


def test_pairs_are_the_first_two_columns_with_ids(tmp_path: Path) -> None:
    path = csv(tmp_path, "1,ISIC_0000001,same,b.jpg", "2,ISIC_0000003,same,b", header="no,ISIC_id,why,ISIC_id_paired")
    assert isic.read_pairs(path, ["b"]) == [("ISIC_0000001", "b"), ("ISIC_0000003", "b")]
    with pytest.raises(UserError, match="two columns of image names"):
        isic.read_pairs(csv(tmp_path, "1,x", header="no,name"), ["b"])


def test_pairs_are_not_an_index_where_names_are_numbers(tmp_path: Path) -> None:
    """As pandas writes it, with a name and without: its numbers are names of images by chance."""
    for index in ("", "row"):
        path = tmp_path / "pairs.csv"
        path.write_text(f"{index},image_name_1,image_name_2\n0,7,9\n1,3,2\n2,11,5\n")
        assert isic.read_pairs(path, ["7", "9", "3", "2", "11", "5", "0", "1"]) == [("7", "9"), ("3", "2"), ("11", "5")]


def test_a_quotation_mark_that_is_never_closed_swallows_no_lines(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,0", '"b,1', "c,0", "d,1", header="image_name,target")
    with pytest.raises(UserError, match=r"cannot be read as a CSV from line \d on, or from a quotation mark before it that is not closed"):
        isic.read_metadata(path)


@pytest.mark.parametrize("lead", ["", "sep=;\r\n"])
@pytest.mark.parametrize("mark", [";", "\t"])
def test_tables_with_semicolons_or_tabs_are_read(tmp_path: Path, mark: str, lead: str) -> None:
    path = tmp_path / "metadata.csv"
    path.write_bytes((lead if mark == ";" else "").encode() + f"image_name{mark}target{mark}age_approx\r\na{mark}1{mark}60\r\n".encode())
    assert isic.read_metadata(path) == ([Row("a", 1, age=60)], [])


def test_a_patient_of_whom_nobody_knows_is_none(tmp_path: Path) -> None:
    rows, _ = isic.read_metadata(csv(tmp_path, *(f"i{n},{word},-,,,,,,0" for n, word in enumerate(["unknown", "UNKNOWN", "-", "?", "-1", "IP_1"]))))
    assert [(row.patient_id, row.lesion_id) for row in rows] == [(None, None)] * 5 + [("IP_1", None)]


def test_ids_are_read_under_their_other_names(tmp_path: Path) -> None:
    rows, _ = isic.read_metadata(csv(tmp_path, "a,IP_1,melanoma,0", header="image,patient,lesion,target"))
    assert (rows[0].patient_id, rows[0].lesion_id) == ("IP_1", None), "lesion may be what it is called"
    table = csv(tmp_path, "a,IP_1,1,IL_1,0", header="image,subject,lesion,lesion_no,target")
    said = isic.without_ids(table)
    assert said.endswith("together (not read: subject, lesion, lesion_no; what holds such ids must be called patient_id or lesion_id)")
    assert isic.without_ids(None).endswith("kept together")
