"""The record types and their Arrow schemas say the same."""

from dataclasses import fields

from pipelines.records import MANIFEST_SCHEMA, REPORT_SCHEMA, Pair, ReportRow


def test_schemas_hold_the_fields_of_their_records() -> None:
    assert {field.name for field in fields(Pair)} == set(MANIFEST_SCHEMA.names)
    assert {field.name for field in fields(ReportRow)} == set(REPORT_SCHEMA.names)


def test_a_column_may_be_null_exactly_where_the_record_has_none_as_default() -> None:
    assert {f.name for f in fields(ReportRow) if f.default is None} == {f.name for f in REPORT_SCHEMA if f.nullable}
