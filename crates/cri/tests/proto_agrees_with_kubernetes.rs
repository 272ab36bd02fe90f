//! The proto file is our own, so its numbers need a witness: the one that the `k8s-cri` package
//! ships is Kubernetes' (about version 1.32). Everything in it must be in ours, the same on the
//! wire; what ours has beyond it is listed here, so that nothing gets in unseen.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto};

/// Everything that matters on the wire, as "owner.name" to a description of it.
type Facts = BTreeMap<String, String>;

fn compile(root: &Path, file: &str) -> FileDescriptorProto {
    let set = protox::compile([file], [root]).unwrap_or_else(|error| panic!("{}: {error}", root.display()));
    set.file.into_iter().find(|f| f.package() == "runtime.v1").expect("package runtime.v1")
}

fn ours() -> Facts {
    facts(&compile(&Path::new(env!("CARGO_MANIFEST_DIR")).join("proto"), "runtime/v1/api.proto"))
}

/// The proto file in the sources of a dev-dependency that is locked but never built. Only cargo knows
/// where those are, and fetches them if they are not there yet. The platform keeps it from fetching
/// every other platform's packages too.
fn theirs() -> Facts {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--locked", "--filter-platform=x86_64-unknown-linux-gnu"])
        .env("RUSTFLAGS", "--cfg a3s_box_reads_its_proto_file")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("metadata is JSON");
    let manifest = metadata["packages"]
        .as_array()
        .expect("packages")
        .iter()
        .find(|package| package["name"] == "k8s-cri")
        .and_then(|package| package["manifest_path"].as_str())
        .map(PathBuf::from)
        .expect("k8s-cri is a dev-dependency");
    facts(&compile(&manifest.parent().expect("a folder").join("proto"), "v1.proto"))
}

fn facts(file: &FileDescriptorProto) -> Facts {
    let mut facts = Facts::new();
    for message in &file.message_type {
        message_facts("", message, &mut facts);
    }
    for item in &file.enum_type {
        enum_facts("", item, &mut facts);
    }
    for service in &file.service {
        for method in &service.method {
            let stream = |yes| if yes { "stream " } else { "" };
            let fact = format!(
                "rpc {}{} -> {}{}",
                stream(method.client_streaming()),
                method.input_type(),
                stream(method.server_streaming()),
                method.output_type()
            );
            facts.insert(format!("{}/{}", service.name(), method.name()), fact);
        }
    }
    facts
}

fn message_facts(scope: &str, message: &DescriptorProto, facts: &mut Facts) {
    let name = format!("{scope}{}", message.name());
    facts.insert(name.clone(), "message".to_owned());
    for field in &message.field {
        let oneof = field.oneof_index.map(|index| message.oneof_decl[index as usize].name().to_owned());
        let kind = match field.r#type() {
            Type::Message | Type::Enum => field.type_name().to_owned(),
            scalar => scalar.as_str_name().to_owned(),
        };
        let many = field.label() == Label::Repeated;
        let fact = format!(
            "{} = {} {kind}{} oneof={oneof:?} optional={} json={}",
            field.name(),
            field.number(),
            if many { " repeated" } else { "" },
            field.proto3_optional(),
            field.json_name(),
        );
        facts.insert(format!("{name}.{}", field.name()), fact);
    }
    let scope = format!("{name}.");
    for nested in &message.nested_type {
        message_facts(&scope, nested, facts);
    }
    for nested in &message.enum_type {
        enum_facts(&scope, nested, facts);
    }
}

fn enum_facts(scope: &str, item: &EnumDescriptorProto, facts: &mut Facts) {
    let name = format!("{scope}{}", item.name());
    facts.insert(name.clone(), "enum".to_owned());
    for value in &item.value {
        facts.insert(format!("{name}::{}", value.name()), format!("= {}", value.number()));
    }
}

/// Kubernetes itself changed this one after `k8s-cri` was cut, to carry environment values that are
/// not UTF-8. The two types have the same encoding.
const TEXT_BECAME_BYTES: &str = "KeyValue.value";

#[test]
fn every_message_field_enum_and_rpc_of_k8s_cri_is_ours_too() {
    let (ours, theirs) = (ours(), theirs());
    assert!(theirs.len() > 700, "only {} facts in k8s-cri's proto file", theirs.len());
    let differences: Vec<String> = theirs
        .iter()
        .filter(|(name, _)| *name != TEXT_BECAME_BYTES)
        .filter(|(name, fact)| ours.get(*name) != Some(fact))
        .map(|(name, fact)| format!("{name}: theirs {fact:?}, ours {:?}", ours.get(name)))
        .collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    assert_eq!(theirs[TEXT_BECAME_BYTES].replace("TYPE_STRING", "TYPE_BYTES"), ours[TEXT_BECAME_BYTES]);
}

#[test]
fn what_is_newer_than_k8s_cri_is_exactly_what_kubernetes_added_since() {
    let theirs = theirs();
    let newer: BTreeSet<String> = ours()
        .into_iter()
        .filter(|(name, _)| !theirs.contains_key(name))
        .map(|(name, fact)| format!("{name}: {fact}"))
        .collect();
    let expected: BTreeSet<String> =
        include_str!("newer-than-k8s-cri.txt").lines().map(str::to_owned).collect();
    let surprising: Vec<_> = newer.difference(&expected).collect();
    let missing: Vec<_> = expected.difference(&newer).collect();
    assert!(
        surprising.is_empty() && missing.is_empty(),
        "surprising: {surprising:#?}\nmissing: {missing:#?}"
    );
}
