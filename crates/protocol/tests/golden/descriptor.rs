//! Numbers and types of everything in agent.proto.

use std::collections::BTreeSet;
use std::path::Path;

use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto};

use super::goldens;

const NAME: &str = "agent.proto.txt";

/// One line for each thing that matters on the wire.
fn facts() -> BTreeSet<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let set = protox::compile(["agent.proto"], [root]).unwrap();
    let mut facts = BTreeSet::new();
    let file: FileDescriptorProto = set.file.into_iter().next().unwrap();
    facts.insert(format!("package {}", file.package()));
    file.message_type.iter().for_each(|message| message_facts("", message, &mut facts));
    file.enum_type.iter().for_each(|item| enum_facts("", item, &mut facts));
    for service in &file.service {
        for method in &service.method {
            assert!(!method.client_streaming() && !method.server_streaming(), "{}", method.name());
            let (input, output) = (method.input_type(), method.output_type());
            facts.insert(format!("rpc {}/{} {input} -> {output}", service.name(), method.name()));
        }
    }
    facts
}

fn message_facts(scope: &str, message: &DescriptorProto, facts: &mut BTreeSet<String>) {
    let name = format!("{scope}{}", message.name());
    facts.insert(format!("message {name}"));
    for field in &message.field {
        let kind = match field.r#type() {
            Type::Message | Type::Enum => field.type_name().to_owned(),
            scalar => scalar.as_str_name().to_owned(),
        };
        let many = if field.label() == Label::Repeated { "repeated " } else { "" };
        let optional = if field.proto3_optional() { "optional " } else { "" };
        let oneof = field.oneof_index.filter(|_| !field.proto3_optional());
        let oneof = oneof.map(|index| format!(" oneof {}", message.oneof_decl[index as usize].name()));
        let (number, field) = (field.number(), field.name());
        facts.insert(format!(
            "field {name}.{field} = {number} {many}{optional}{kind}{}",
            oneof.unwrap_or_default()
        ));
    }
    let scope = format!("{name}.");
    message.nested_type.iter().for_each(|nested| message_facts(&scope, nested, facts));
    message.enum_type.iter().for_each(|nested| enum_facts(&scope, nested, facts));
}

fn enum_facts(scope: &str, item: &EnumDescriptorProto, facts: &mut BTreeSet<String>) {
    let name = format!("{scope}{}", item.name());
    for value in &item.value {
        facts.insert(format!("value {name}.{} = {}", value.name(), value.number()));
    }
}

fn lines(bytes: &[u8]) -> BTreeSet<String> {
    String::from_utf8_lossy(bytes).lines().map(str::to_owned).collect()
}

/// A field with another number or type is garbage to an agent of another build, and a call with another name unknown.
#[test]
fn golden_numbers_and_types_are_never_changed_or_given_away() {
    let ours = facts();
    let text: String = ours.iter().map(|fact| format!("{fact}\n")).collect();
    goldens("descriptor").check_by(NAME, text.as_bytes(), |newest| lines(&newest.bytes) == ours);
    for golden in goldens("descriptor").ages(NAME) {
        let gone: Vec<String> = lines(&golden.bytes).difference(&ours).cloned().collect();
        assert!(
            gone.is_empty(),
            "of {} this build has changed or removed:\n{}\nAgents of older builds are running: give new things new numbers \
             and names, and leave these (docs/versioning.md)",
            golden.path.display(),
            gone.join("\n")
        );
    }
}

#[test]
fn no_two_fields_of_a_message_have_one_number() {
    let mut seen = BTreeSet::new();
    for fact in facts() {
        if let Some((name, rest)) = fact.strip_prefix("field ").and_then(|fact| fact.split_once(" = ")) {
            let (message, number) = (name.rsplit_once('.').unwrap().0, rest.split(' ').next().unwrap());
            assert!(seen.insert(format!("{message} {number}")), "{fact}");
        }
    }
    assert!(seen.len() > 150, "only {} fields were seen", seen.len());
}
