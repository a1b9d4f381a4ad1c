"""`relay.ui.markup`: no text becomes an element, an attribute, a script or a link to elsewhere."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.ui.markup import Markup, escape, join, maker, tag

HOSTILE = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><svg onload=alert(1)>', "'onclick='a()'",
    "</pre></td></table><h1>", "<!--", "]]>", "&lt;b&gt;", "&#60;b&#62;", "\0<b\0>", "<\x0cb>", "\u202e<b>",
    "\ud83d<b>", "\uff1cb\uff1e", "`", "javascript:alert(1)", "{{7*7}}", "<template><b>", "<plaintext>",
    "\r\n<b>",
)  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(exclude_categories=()), max_size=60),
    st.text("<>&\"'=/ !-abon\0\n", max_size=60),
)


class Read(HTMLParser):
    """The elements, their attributes and the text of a page."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self.others = [], "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.others.append(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


def shown(text):
    """Return a text as a page shows it: control characters are escaped."""
    marks = {0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)}
    marks |= {*range(0x20), *range(0x7F, 0xA0)} - {0x09, 0x0A}
    return "".join(ascii(each)[1:-1] if ord(each) in marks else each for each in text)


@given(TEXTS, TEXTS)
def test_any_text_stays_a_text(content, value):
    page = tag("p", content, tag("b", [content, 1]), title=value, data_x=value)
    page.encode()
    read = Read(page)
    assert read.elements == [("p", {"title": shown(value), "data-x": shown(value)}), ("b", {})]
    assert read.text == shown(content) + shown(content) + "1"
    assert read.others == []
    assert "<" not in escape(content)
    for inner in (content, [content, 1], tag("i", content), None, 7):
        assert maker("td", data_x=value)(inner) == tag("td", inner, data_x=value)


@given(TEXTS)
def test_an_address_of_a_stranger_is_refused_or_stays_inside(value):
    try:
        page = tag("a", "x", href=value)
    except ValueError:
        return
    [(_, attributes)] = Read(page).elements
    before = attributes["href"].partition("?")[0].partition("#")[0]
    assert ":" not in before
    assert not attributes["href"].startswith("//")
    assert "\\" not in value


@pytest.mark.parametrize(
    "address",
    ["javascript:a()", "JavaScript:a()", " javascript:a()", "java\tscript:a()", "\x01javascript:a()",
     "data:text/html,x", "//evil.example", "\\\\evil.example", "/\\evil.example", "http://evil.example",
     "https:evil.example", "a:b/c", "x\n//evil.example", "./x?a=b c"],
)  # fmt: skip
@pytest.mark.parametrize("attribute", ["href", "src", "formaction", "action", "srcset", "poster"])
def test_addresses_outside_of_the_dashboard_are_an_error(attribute, address):
    with pytest.raises(ValueError, match="relative"):
        tag("a", **{attribute: address})


@pytest.mark.parametrize("address", ["./", "../events/", "events/evt_1", "?cursor=a:b", "#top", "?u=http:x"])
def test_relative_addresses_are_written(address):
    assert tag("a", href=address) == f'<a href="{address}"></a>'


@pytest.mark.parametrize(
    "attribute", ["onclick", "onerror", "style", "srcdoc", "http_equiv", "on_load", "x y", "a>", "", "ÄB"]
)
def test_attributes_that_could_run_code_are_an_error(attribute):
    with pytest.raises(ValueError, match="not allowed"):
        tag("p", **{attribute: "x"})


@pytest.mark.parametrize("name", ["iframe", "object", "embed", "base", "style", "a b", "P", "", "p><b"])
def test_elements_that_could_run_code_are_an_error(name):
    with pytest.raises(ValueError, match="not allowed"):
        tag(name)


def test_a_script_has_no_text():
    assert tag("script", src="app.js") == '<script src="app.js"></script>'
    with pytest.raises(ValueError, match="no text"):
        tag("script", "alert(1)")


def test_markup_is_not_escaped_again_and_nothing_is_left_out():
    inner = tag("b", "&")
    assert tag("p", inner, None, [1, "<", (2.5, inner)]) == "<p><b>&amp;</b>1&lt;2.5<b>&amp;</b></p>"
    assert tag("input", type="text", disabled=True, value="", hidden=None, checked=False) == (
        '<input type="text" disabled value="">'
    )
    assert join("<", inner) == "&lt;<b>&amp;</b>"
    assert isinstance(join(), Markup)


@pytest.mark.parametrize("changed", [str.upper, lambda text: text + "<b>", lambda text: f"{text}<b>"])
def test_a_changed_markup_is_a_text_again(changed):
    assert "<b>" not in tag("p", changed(tag("i", "x"))).lower().replace("<i>", "")
