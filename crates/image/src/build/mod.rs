//! Images out of a Dockerfile that runs nothing: a base, files, and a config.

mod dockerfile;
mod layer;
mod sources;
mod tree;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use thiserror::Error;

use self::dockerfile::{Instruction, instructions, words};
use self::layer::Copy;
use self::sources::{Ignored, inside};
use self::tree::Tree;
use crate::digest::Digest;
use crate::local::{LocalError, LocalFiles, blob_name};
use crate::manifest::Platform;
use crate::reference::{LocalKind, LocalReference, Reference};

/// A Dockerfile or a document of a base is not larger.
const LARGEST_DOCUMENT: u64 = 4 << 20;

/// An image that could not be built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// An instruction.
    #[error("{}:{line}: {problem}", file.display())]
    Instruction {
        /// The Dockerfile.
        file: PathBuf,
        /// Where the instruction begins.
        line: usize,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The base of the image.
    #[error("{}:{line}: could not read the base", file.display())]
    Base {
        /// The Dockerfile.
        file: PathBuf,
        /// Where the instruction begins.
        line: usize,
        /// Why.
        #[source]
        source: LocalError,
    },
    /// A file of the build.
    #[error("could not {action} {}", path.display())]
    Io {
        /// What was to be done.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What to build.
#[derive(Debug, Clone)]
pub struct BuildRequest {
    /// The Dockerfile.
    pub file: PathBuf,
    /// The directory that `COPY` and `ADD` take from.
    pub context: PathBuf,
    /// An OCI archive of the base, if `FROM` names an image of a registry: see [`registry_base`].
    pub base: Option<PathBuf>,
    /// What the image is called in the layout.
    pub names: Vec<String>,
    /// The time of all files, in seconds since 1970.
    pub epoch: u64,
}

struct Build<'a> {
    request: &'a BuildRequest,
    output: &'a Path,
    ignored: Ignored,
    config: Value,
    layers: Vec<Value>,
    /// What the first of the layers, as many as were looked at, have.
    tree: Tree,
    seen: usize,
    /// Whether the file itself has a CMD.
    commanded: bool,
}

/// The name that a Dockerfile's `FROM` has, if it is an image of a registry. Blocks on the disk.
///
/// # Errors
/// The file cannot be read.
pub fn registry_base(file: &Path) -> Result<Option<String>, BuildError> {
    let text = fs::read_to_string(file).map_err(io_error("read", file))?;
    let from = instructions(&text).into_iter().find(|instruction| instruction.keyword == "FROM");
    let name = from.map(|from| image(&from.rest).to_owned()).filter(|name| name != "scratch");
    Ok(name.filter(|name| matches!(name.parse(), Ok(Reference::Registry(_)))))
}

/// What `FROM` names; that the stage has a name of its own does not matter, as there is one only.
fn image(rest: &str) -> &str {
    match rest.split_whitespace().collect::<Vec<_>>()[..] {
        [image, word, _] if word.eq_ignore_ascii_case("AS") => image,
        _ => rest,
    }
}

/// Builds an OCI layout in `output`, an empty directory. Blocks on the disk.
///
/// The same Dockerfile, context and epoch give the same bytes. Returns the digest of the manifest.
///
/// # Errors
/// An instruction that is wrong or not supported, with its line; a base or file that cannot be read; a full disk.
pub fn build(request: &BuildRequest, output: &Path) -> Result<Digest, BuildError> {
    let text = fs::read_to_string(&request.file).map_err(io_error("read", &request.file))?;
    let ignored = ignored(request)?;
    let blobs = output.join("blobs/sha256");
    fs::create_dir_all(&blobs).map_err(io_error("make", &blobs))?;
    let mut build = Build {
        request,
        output,
        ignored,
        config: Value::Null,
        layers: Vec::new(),
        tree: Tree::default(),
        seen: 0,
        commanded: false,
    };
    for instruction in instructions(&text) {
        build.instruction(&instruction)?;
    }
    if build.config.is_null() {
        return Err(build.wrong(1, "there is no FROM: begin with FROM scratch or FROM IMAGE"));
    }
    build.finish()
}

/// What is left out of the context: a file beside the Dockerfile goes before the context's.
fn ignored(request: &BuildRequest) -> Result<Ignored, BuildError> {
    let mut special = request.file.clone().into_os_string();
    special.push(".dockerignore");
    for path in [PathBuf::from(special), request.context.join(".dockerignore")] {
        match fs::read_to_string(&path) {
            Ok(text) => return Ok(Ignored::parse(&text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_error("read", &path)(error)),
        }
    }
    Ok(Ignored::default())
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    let path = path.to_owned();
    move |source| BuildError::Io { action, path, source }
}

impl Build<'_> {
    fn wrong(&self, line: usize, problem: impl Into<String>) -> BuildError {
        BuildError::Instruction { file: self.request.file.clone(), line, problem: problem.into() }
    }

    fn instruction(&mut self, instruction: &Instruction) -> Result<(), BuildError> {
        let Instruction { line, keyword, rest } = instruction;
        if keyword == "FROM" {
            return self.from(*line, rest);
        }
        if self.config.is_null() {
            return Err(self.wrong(*line, format!("{keyword} before FROM: begin with FROM")));
        }
        let applied = match keyword.as_str() {
            "COPY" | "ADD" => return self.copy(*line, keyword == "ADD", rest),
            "ENV" => self.pairs(rest).map(|pairs| self.env(pairs)),
            "LABEL" => self.pairs(rest).map(|pairs| {
                for (name, value) in pairs {
                    self.config["config"]["Labels"][name] = value.into();
                }
            }),
            "WORKDIR" => self.one(rest).and_then(|path| {
                let path = self.absolute(&path)?;
                self.config["config"]["WorkingDir"] = format!("/{}", path.display()).into();
                Ok(())
            }),
            "USER" => self.one(rest).map(|user| self.config["config"]["User"] = user.into()),
            "STOPSIGNAL" => self.one(rest).map(|signal| self.config["config"]["StopSignal"] = signal.into()),
            "EXPOSE" => self.words(rest).map(|ports| {
                for port in ports {
                    let port = if port.contains('/') { port } else { format!("{port}/tcp") };
                    self.config["config"]["ExposedPorts"][port] = json!({});
                }
            }),
            "ENTRYPOINT" => command(rest).map(|command| {
                self.config["config"]["Entrypoint"] = command;
                // The base's arguments were for the base's program.
                if let Some(config) = self.config["config"].as_object_mut().filter(|_| !self.commanded) {
                    config.remove("Cmd");
                }
            }),
            "CMD" => command(rest).map(|command| {
                self.config["config"]["Cmd"] = command;
                self.commanded = true;
            }),
            "RUN" => {
                Err("RUN is not supported, a build runs nothing: make the files outside and COPY them".into())
            }
            _ => Err(format!(
                "{keyword} is not supported: only FROM, COPY, ADD, ENV, LABEL, WORKDIR, USER, EXPOSE, \
                 STOPSIGNAL, ENTRYPOINT and CMD are; build the image elsewhere or leave it out"
            )),
        };
        applied.map_err(|problem| self.wrong(*line, problem))
    }

    fn from(&mut self, line: usize, rest: &str) -> Result<(), BuildError> {
        if !self.config.is_null() {
            return Err(self.wrong(
                line,
                "a second FROM: builds of several stages are not supported, build them one by one",
            ));
        }
        let rest = image(rest);
        if rest == "scratch" {
            let host = Platform::host();
            self.config = json!({
                "os": host.os, "architecture": host.architecture, "config": {},
                "rootfs": { "type": "layers", "diff_ids": [] },
            });
            return Ok(());
        }
        let reference = match (rest.parse::<Reference>(), &self.request.base) {
            (Ok(Reference::Local(reference)), _) if reference.kind != LocalKind::DockerArchive => reference,
            (Ok(Reference::Registry(_)), Some(archive)) => {
                LocalReference { kind: LocalKind::OciArchive, path: archive.clone(), name: None }
            }
            _ => {
                let problem = format!(
                    "FROM {rest} is neither scratch, NAME[:TAG] of an image, oci:DIR[:NAME] nor \
                     oci-archive:FILE[:NAME]: load another archive first and take it by its name"
                );
                return Err(self.wrong(line, problem));
            }
        };
        let base = |source| BuildError::Base { file: self.request.file.clone(), line, source };
        let files = LocalFiles::open(&reference).map_err(base)?;
        let wrong = |source| base(LocalError::Manifest { path: reference.path.clone(), source });
        let (manifest, bytes) =
            files.layout_image(reference.name.as_deref(), LARGEST_DOCUMENT).map_err(base)?;
        let config = files.read_blob(&manifest.config.digest, LARGEST_DOCUMENT).map_err(base)?;
        crate::manifest::parse_config(&config, manifest.layers.len(), &Platform::host()).map_err(wrong)?;
        for layer in &manifest.layers {
            let target = self.output.join(blob_name(&layer.digest));
            let parent = target.parent().unwrap_or(self.output);
            fs::create_dir_all(parent).map_err(io_error("make", parent))?;
            let mut from = files
                .find(&blob_name(&layer.digest))
                .map_err(base)?
                .open()
                .map_err(io_error("read", &reference.path))?;
            File::create(&target)
                .and_then(|mut file| io::copy(&mut from, &mut file))
                .map_err(io_error("write", &target))?;
        }
        let json = |bytes: &[u8]| {
            serde_json::from_slice::<Value>(bytes).map_err(|e| self.wrong(line, e.to_string()))
        };
        let layers = json(&bytes)?["layers"].as_array().cloned().unwrap_or_default();
        let mut config = json(&config)?;
        self.layers = layers;
        if !config["config"].is_object() {
            config["config"] = json!({});
        }
        // It would not tell of the layers that follow.
        config.as_object_mut().and_then(|config| config.remove("history"));
        self.config = config;
        Ok(())
    }

    /// Looks at the layers that are new.
    fn look(&mut self) -> Result<(), String> {
        for layer in &self.layers[self.seen..] {
            let digest = layer["digest"].as_str().unwrap_or_default();
            let read = |e: &dyn std::fmt::Display| format!("could not read layer {digest} of the image: {e}");
            let digest: Digest = digest.parse().map_err(|e| read(&e))?;
            let blob = File::open(self.output.join(blob_name(&digest))).map_err(|e| read(&e))?;
            self.tree.apply(blob).map_err(|e| read(&e))?;
            self.seen += 1;
        }
        Ok(())
    }

    fn copy(&mut self, line: usize, add: bool, rest: &str) -> Result<(), BuildError> {
        let copy = self.parse_copy(add, rest).map_err(|problem| self.wrong(line, problem))?;
        self.look().map_err(|problem| self.wrong(line, problem))?;
        let path = self.output.join("blobs/layer");
        let file = File::create(&path).map_err(io_error("write", &path))?;
        let written = layer::write(&self.request.context, &self.ignored, &self.tree, &copy, file)
            .map_err(|problem| self.wrong(line, problem))?;
        let blob = self.output.join(blob_name(&written.digest));
        fs::rename(&path, &blob).map_err(io_error("write", &blob))?;
        self.layers.push(json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": written.digest.to_string(), "size": written.size,
        }));
        if let Some(ids) = self.config["rootfs"]["diff_ids"].as_array_mut() {
            ids.push(written.diff_id.to_string().into());
        }
        Ok(())
    }

    fn parse_copy(&self, add: bool, rest: &str) -> Result<Copy, String> {
        let keyword = if add { "ADD" } else { "COPY" };
        let mut words = if rest.starts_with('[') { exec(rest)? } else { self.words(rest)? };
        let (mut owner, mut mode) = (None, None);
        while words.first().is_some_and(|word| word.starts_with("--")) {
            let flag = words.remove(0);
            if let Some(text) = flag.strip_prefix("--chown=") {
                let (user, group) = text.split_once(':').unwrap_or((text, text));
                let id = |text: &str| text.parse::<u32>().map(u64::from);
                owner = Some(id(user).and_then(|user| Ok((user, id(group)?))).map_err(|_| {
                    format!("{flag} is not of numbers, and a build knows no names: write --chown=UID:GID")
                })?);
            } else if let Some(text) = flag.strip_prefix("--chmod=") {
                let bits = u32::from_str_radix(text, 8).ok().filter(|bits| *bits <= 0o7777);
                mode = Some(bits.ok_or_else(|| format!("{flag} is not octal, such as --chmod=755"))?);
            } else {
                return Err(format!("{flag} is not supported: only --chown and --chmod are"));
            }
        }
        let target =
            words.pop().filter(|_| !words.is_empty()).ok_or(format!("{keyword} needs SOURCE... TARGET"))?;
        if let Some(text) = words.iter().find(|word| word.starts_with("<<")) {
            return Err(format!(
                "{text} begins a text in the Dockerfile, which is not supported: make it a file"
            ));
        }
        let remote = |word: &&String| word.contains("://") || word.starts_with("git@");
        if let Some(url) = words.iter().find(remote) {
            return Err(format!(
                "{url} is not fetched, a build is of local files: download it first and COPY it"
            ));
        }
        let slash = target.ends_with('/') || target.ends_with("/.") || target == ".";
        let (target, mtime) = (self.absolute(&target)?, self.request.epoch);
        Ok(Copy { add, sources: words, target, into_directory: slash, owner, mode, mtime })
    }

    /// Below the root, from the working directory on.
    fn absolute(&self, path: &str) -> Result<PathBuf, String> {
        let directory = self.config["config"]["WorkingDir"].as_str().unwrap_or_default();
        if path.starts_with('/') { inside(path) } else { inside(format!("{directory}/{path}")) }
    }

    fn current_env(&self) -> Vec<String> {
        let env = self.config["config"]["Env"].as_array();
        env.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    fn words(&self, rest: &str) -> Result<Vec<String>, String> {
        words(rest, &self.current_env())
    }

    fn one(&self, rest: &str) -> Result<String, String> {
        match <[String; 1]>::try_from(self.words(rest)?) {
            Ok([word]) => Ok(word),
            Err(words) => {
                Err(format!("one word is needed, here are {}: quote it if it has spaces", words.len()))
            }
        }
    }

    fn pairs(&self, rest: &str) -> Result<Vec<(String, String)>, String> {
        let pair = |word: String| match word.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
            _ => Err(format!("{word:?} is not NAME=VALUE")),
        };
        self.words(rest)?.into_iter().map(pair).collect()
    }

    fn env(&mut self, pairs: Vec<(String, String)>) {
        let mut env = self.current_env();
        for (name, value) in pairs {
            env.retain(|pair| pair.split_once('=').is_none_or(|(other, _)| other != name));
            env.push(format!("{name}={value}"));
        }
        self.config["config"]["Env"] = env.into();
    }

    fn finish(self) -> Result<Digest, BuildError> {
        let blob = |value: &Value| -> Result<(Digest, usize), BuildError> {
            let bytes = value.to_string();
            let digest = Digest::sha256(bytes.as_bytes());
            let path = self.output.join(blob_name(&digest));
            fs::write(&path, &bytes).map_err(io_error("write", &path))?;
            Ok((digest, bytes.len()))
        };
        let (config, size) = blob(&self.config)?;
        let manifest_type = "application/vnd.oci.image.manifest.v1+json";
        let (digest, length) = blob(&json!({
            "schemaVersion": 2, "mediaType": manifest_type, "layers": self.layers,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": config.to_string(), "size": size,
            },
        }))?;
        let plain = json!({ "mediaType": manifest_type, "digest": digest.to_string(), "size": length });
        let named = |name: &String| {
            let mut entry = plain.clone();
            entry["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
            entry
        };
        let entries: Vec<_> = self.request.names.iter().map(named).collect();
        let entries = if entries.is_empty() { vec![plain.clone()] } else { entries };
        let index = json!({ "schemaVersion": 2, "manifests": entries }).to_string();
        for (name, text) in [("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#), ("index.json", &index)] {
            let path = self.output.join(name);
            fs::write(&path, text).map_err(io_error("write", &path))?;
        }
        Ok(digest)
    }
}

fn exec(text: &str) -> Result<Vec<String>, String> {
    serde_json::from_str(text).map_err(|e| format!("{text} is not a list of strings in double quotes: {e}"))
}

/// The list form as it is, the other through a shell.
fn command(text: &str) -> Result<Value, String> {
    if text.starts_with('[') { Ok(exec(text)?.into()) } else { Ok(json!(["/bin/sh", "-c", text])) }
}

#[cfg(test)]
mod tests;
