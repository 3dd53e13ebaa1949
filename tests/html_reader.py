"""A page as its reader finds it, for tests."""

from html.parser import HTMLParser

VOID = {"meta", "input", "br"}


class Whole(HTMLParser):
    """Checks that what is opened is closed, and keeps tags with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


class Tables(Whole):
    """The tables of a page: rows of the texts of their cells."""

    def __init__(self, text):
        self.tables, self.words = [], []
        super().__init__(text)

    def handle_starttag(self, tag, attributes):
        super().handle_starttag(tag, attributes)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data):
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def headed(self, *head):
        """The tables whose headings begin so."""
        return [rows for rows in self.tables if tuple(rows[0][: len(head)]) == head]
