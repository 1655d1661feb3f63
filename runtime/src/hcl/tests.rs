use proptest::prelude::*;

use super::*;

fn root(text: &str) -> Object {
    Document::parse(text).unwrap().root
}

fn refusal(text: &str) -> HclError {
    Document::parse(text).unwrap_err()
}

/// A tree without lines, for comparison.
fn shape(object: &Object) -> serde_json::Value {
    fn value(kind: &Kind) -> serde_json::Value {
        match kind {
            Kind::Text(text) => text.as_str().into(),
            Kind::Number(text) => format!("#{text}").into(),
            Kind::Boolean(value) => (*value).into(),
            Kind::Null => serde_json::Value::Null,
            Kind::List(values) => values.iter().map(|v| value(&v.kind)).collect(),
            Kind::Object(object) => shape(object),
        }
    }
    let pairs = object.items.iter().map(|item| serde_json::json!([item.key, value(&item.value.kind)]));
    serde_json::Value::Array(pairs.collect())
}

#[test]
fn reads_a_typical_configuration() {
    let text = r##"
# comment
server {  // another
    bind_address = "0.0.0.0" bind_port = 8081
    admin_ids = ["spiffe://a/b", "spiffe://a/c",]
    ratelimit = { attestation = false }
    /* a
       long one */
    "quoted" = 0x10
}
plugins {
    NodeAttestor "join_token" { plugin_data {} }
    NodeAttestor "x509pop" { plugin_data { ca_bundle_path = "/ca.pem" } }
}
"##;
    let expected = serde_json::json!([
        [
            "server",
            [
                ["bind_address", "0.0.0.0"],
                ["bind_port", "#8081"],
                ["admin_ids", ["spiffe://a/b", "spiffe://a/c"]],
                ["ratelimit", [["attestation", false]]],
                ["quoted", "#0x10"]
            ]
        ],
        [
            "plugins",
            [
                ["NodeAttestor", [["join_token", [["plugin_data", []]]]]],
                ["NodeAttestor", [["x509pop", [["plugin_data", [["ca_bundle_path", "/ca.pem"]]]]]]]
            ]
        ]
    ]);
    assert_eq!(shape(&root(text)), expected);
}

#[test]
fn json_is_the_same_tree() {
    let hcl = r#"plugins { DataStore "sql" { plugin_data { a = "b" n = 1 } } } x = [true]"#;
    let json = r#" { "plugins": {"DataStore": {"sql": {"plugin_data": {"a": "b", "n": 1}}}}, "x": [true] } "#;
    assert_eq!(shape(&root(hcl)), shape(&root(json)));
}

#[test]
fn lines_are_kept() {
    let root = root("a = 1\n\n/* two\nlines */ b {\n  c = <<E\ntext\nE\n  d = 2\n}\n");
    assert_eq!(root.items[0].line, 1);
    assert_eq!(root.items[1].line, 4);
    let Kind::Object(b) = &root.items[1].value.kind else { panic!() };
    assert_eq!((b.items[0].line, b.items[1].line), (5, 8));
    let json = Document::parse("{\n\"a\": 1,\n\n\"b\": [\n2]}").unwrap().root;
    assert_eq!((json.items[0].line, json.items[1].line), (2, 4));
}

#[test]
fn strings_and_heredocs() {
    let text = |source: &str| match &root(source).items[0].value.kind {
        Kind::Text(text) => text.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(text(r#"a = "x\ty\"z\\ \u00e9 \x41 \101""#), "x\ty\"z\\ é A A");
    assert_eq!(text(r#"a = "pre ${lookup("x")} post""#), "pre ${lookup(\"x\")} post");
    assert_eq!(text(r#"a = "100%{""#), "100%{");
    assert_eq!(text("a = <<EOF\n one\ntwo\nEOF\n"), " one\ntwo\n");
    assert_eq!(text("a = <<-EOF\n    one\n      two\n    EOF\n"), "one\n  two\n");
    assert_eq!(text("a = <<-EOF\n  one\n      two\n    EOF"), "  one\n      two\n");
}

#[test]
fn heredocs_of_crlf_files_have_no_carriage_return() {
    let text = |source: &str| match &root(source).items[0].value.kind {
        Kind::Text(text) => text.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(text("a = <<EOF\r\n one\r\n\r\ntwo\rx\r\nEOF\r\n"), " one\n\ntwo\rx\n");
    assert_eq!(text("a = <<-EOF\r\n    one\r\n      two\r\n    EOF\r\n"), "one\n  two\n");
    let document = root("a = <<EOF\r\none\r\nEOF\r\nb = 1\r\n");
    assert_eq!((document.items[1].key.as_str(), document.items[1].line), ("b", 4));
}

#[test]
fn mistakes_have_their_line() {
    assert_eq!(refusal("a = \"x"), HclError::Unterminated { line: 1, what: "a string" });
    assert_eq!(refusal("\na = \"x\n\""), HclError::Unterminated { line: 2, what: "a string" });
    assert_eq!(refusal("\nserver {\n a = 1\n"), HclError::Unterminated { line: 2, what: "a block" });
    assert_eq!(refusal("a = [1,\n2"), HclError::Unterminated { line: 1, what: "a list" });
    assert_eq!(refusal("/* x"), HclError::Unterminated { line: 1, what: "a comment" });
    assert_eq!(refusal("a = <<E\nx"), HclError::Unterminated { line: 1, what: "a heredoc" });
    assert_eq!(refusal("a = \"\\.\""), HclError::Escape { line: 1, escape: '.' });
    assert_eq!(refusal("a = 1.2.3"), HclError::Number { line: 1, text: "1.2.3".into() });
    assert_eq!(refusal("a\n= yes").line(), Some(2));
    assert_eq!(refusal("x = 1\n}").line(), Some(2));
    assert_eq!(refusal("a \"b\" = 1").line(), Some(1));
    assert_eq!(refusal("{\"a\": 1,}").line(), Some(1));
    assert_eq!(refusal("{\"a\" 1}").line(), Some(1));
    assert_eq!(refusal("{\n\"a\": 01}"), HclError::Number { line: 2, text: "01".into() });
    assert_eq!(refusal(&format!("a = {}", "[".repeat(40))), HclError::TooDeep { line: 1 });
    assert_eq!(refusal(&"{\"a\":".repeat(40)), HclError::TooDeep { line: 1 });
    assert_eq!(refusal(&" ".repeat(MAX_BYTES + 1)), HclError::TooLong);
}

#[test]
fn typed_reading_collects_every_mistake() {
    let document = Document::parse(
        "s {\n port = \"8081\"\n flag = \"true\"\n name = 7\n list = \"x\"\n sokcet_path = \"\"\n block = 3\n}\nS { extra = [1, true] }",
    )
    .unwrap();
    let mistakes = Mistakes::new();
    let section = Section::root(&document, &mistakes).section("s").unwrap();
    assert_eq!(section.integer("port").unwrap().value, 8081);
    assert!(section.boolean("flag").is_none());
    assert_eq!(section.text("name").unwrap(), Located { value: "7".into(), line: Some(4), key: "s.name".into() });
    assert!(section.texts("list").is_none());
    assert!(section.text("socket_path").is_none());
    assert!(section.section("block").is_some_and(|s| s.keys().is_empty()));
    assert_eq!(section.texts("extra").unwrap().value[0].value, "1");
    section.refuse_unknown();
    let (refused, warned) = mistakes.take();
    assert!(warned.is_empty());
    let seen: Vec<_> = refused.iter().map(|m| (m.line.unwrap(), m.key.as_str(), m.message.as_str())).collect();
    assert_eq!(
        seen,
        [
            (3, "s.flag", "is a string, not true or false, without quotes"),
            (5, "s.list", "is a string, not a list of strings: [\"…\"]"),
            (6, "s.sokcet_path", "unknown key"),
            (7, "s.block", "is a number, not a block"),
            (9, "s.extra[1]", "is a boolean, not a string in double quotes"),
        ]
    );
    assert_eq!(refused[2].remedy, "did you mean socket_path?");
}

#[test]
fn labels_come_in_order_from_either_spelling() {
    for text in [
        "p { A \"x\" { n = 1 } A \"y\" {} }",
        "p { A = { x = { n = 1 } y = {} } }",
        "{\"p\": {\"A\": [{\"x\": {\"n\": 1}}, {\"y\": {}}]}}",
        "{\"p\": [{\"A\": {\"x\": [{\"n\": 1}], \"y\": {}}}]}",
    ] {
        let document = Document::parse(text).unwrap();
        let plugins = Section::root(&document, &Mistakes::new()).section("p").unwrap();
        let labels = plugins.labelled("A");
        assert_eq!(labels.iter().map(|(label, _)| label.value.as_str()).collect::<Vec<_>>(), ["x", "y"], "{text}");
        assert_eq!(labels[0].1.integer("n").unwrap().value, 1);
    }
}

#[test]
fn integers_of_every_base() {
    for (text, value) in [("0", 0), ("-5", -5), ("0x1F", 31), ("010", 8), ("42", 42)] {
        assert_eq!(parse::integer(text), Some(value));
    }
    for text in ["", "1.5", "0x", "1e3", "--1", "abc", "9223372036854775808"] {
        assert_eq!(parse::integer(text), None, "{text}");
    }
}

#[test]
fn hostile_texts_are_told_short_and_without_control_characters() {
    let mistakes = Mistakes::new();
    let long = format!("{:?}: is wrong", "\u{430}".repeat(1 << 20));
    mistakes.refuse(None, "server.a\u{1b}[2J\nb", long, "remove it");
    let (refused, _) = mistakes.take();
    assert_eq!(refused[0].key, "server.a\\u{1b}[2J\\nb");
    assert!(refused[0].message.len() < 512 && refused[0].message.ends_with(": is wrong"), "{}", refused[0].message);
}

proptest! {
    #[test]
    fn never_panics(text in "\\PC*") {
        let _ = Document::parse(&text);
    }

    #[test]
    fn never_panics_on_near_misses(text in r#"[a-c{}\[\]=,"\\$<\-\n #/*0-9.]{0,60}"#) {
        let _ = Document::parse(&text);
        let _ = Document::parse(&format!("{{{text}"));
    }

    #[test]
    fn json_strings_come_back(text in "\\PC*") {
        let json = serde_json::json!({ "a": text }).to_string();
        let document = Document::parse(&json).unwrap();
        prop_assert_eq!(&document.root.items[0].value.kind, &Kind::Text(text));
    }
}
