//! Images.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use a3s_box_image::Usage;
use a3s_box_image::reference::Reference;

use crate::convert::{InvalidRequest, image as convert, non_empty, required};
use crate::error::CriError;
use crate::proto::{
    FilesystemIdentifier, FilesystemUsage, Image, ImageFilter, ImageFsInfoRequest, ImageFsInfoResponse,
    ImageSpec, ImageStatusRequest, ImageStatusResponse, PullImageRequest, PullImageResponse,
    RemoveImageRequest, RemoveImageResponse, UInt64Value,
};
use crate::service::{CriService, json, now_ns};

impl CriService {
    pub(crate) fn list_images(&self, filter: Option<ImageFilter>) -> Result<Vec<Image>, CriError> {
        let wanted = filter.and_then(|filter| filter.image).map(|spec| spec.image).unwrap_or_default();
        let records = match wanted.as_str() {
            "" => self.images.list(),
            name => self.images.find(name)?.into_iter().collect(),
        };
        Ok(records.iter().map(convert::image).collect())
    }

    pub(crate) fn image_status(&self, request: ImageStatusRequest) -> Result<ImageStatusResponse, CriError> {
        let name = image_name(request.image)?;
        let record = self.images.find(&name)?;
        let info = match &record {
            Some(record) if request.verbose => HashMap::from([("info".to_owned(), json(record))]),
            Some(_) | None => HashMap::new(),
        };
        Ok(ImageStatusResponse { image: record.as_ref().map(convert::image), info })
    }

    pub(crate) async fn pull_image(&self, request: PullImageRequest) -> Result<PullImageResponse, CriError> {
        let name = image_name(request.image)?;
        refuse_local(&name)?;
        let auth = request.auth.map(convert::auth);
        let record = self.images.pull(&name, auth, None).await?;
        Ok(PullImageResponse { image_ref: record.id })
    }

    pub(crate) async fn remove_image(
        &self,
        request: RemoveImageRequest,
    ) -> Result<RemoveImageResponse, CriError> {
        let name = image_name(request.image)?;
        self.images.remove(&name).await?;
        Ok(RemoveImageResponse {})
    }

    pub(crate) async fn image_fs_info(
        &self,
        _request: ImageFsInfoRequest,
    ) -> Result<ImageFsInfoResponse, CriError> {
        let timestamp = now_ns();
        let images = self.images.usage().await?;
        let scratch = measure(self.settings.scratch_dir.clone()).await?;
        Ok(ImageFsInfoResponse {
            image_filesystems: vec![filesystem(timestamp, &self.images.directory(), images)],
            container_filesystems: vec![filesystem(timestamp, &self.settings.scratch_dir, scratch)],
        })
    }
}

/// Whoever may write a pod names its image; what lies in the node's files is not theirs to read.
fn refuse_local(name: &str) -> Result<(), InvalidRequest> {
    match name.parse() {
        Ok(Reference::Local(local)) => Err(InvalidRequest::new(
            "image.image",
            format!(
                "{:?} names a file of the node, which pods may not read; push the image to a registry, or use `a3s-box run`",
                local.kind.prefix()
            ),
        )),
        // What is no reference at all is the store's to explain.
        Ok(Reference::Registry(_)) | Err(_) => Ok(()),
    }
}

fn image_name(spec: Option<ImageSpec>) -> Result<String, CriError> {
    Ok(non_empty(required(spec, "image")?.image, "image.image")?)
}

fn filesystem(timestamp: i64, path: &Path, usage: Usage) -> FilesystemUsage {
    FilesystemUsage {
        timestamp,
        fs_id: Some(FilesystemIdentifier { mountpoint: path.display().to_string() }),
        used_bytes: Some(UInt64Value { value: usage.bytes }),
        inodes_used: Some(UInt64Value { value: usage.inodes }),
    }
}

/// The blocks that a folder of sparse files really takes.
async fn measure(dir: PathBuf) -> Result<Usage, CriError> {
    let path = dir.display().to_string();
    let walked = tokio::task::spawn_blocking(move || walk(&dir)).await;
    walked
        .unwrap_or_else(|panic| Err(io::Error::other(panic)))
        .map_err(|source| CriError::Measure { path, source })
}

/// Boxes come and go meanwhile: what vanished counts nothing.
fn walk(dir: &Path) -> io::Result<Usage> {
    let mut usage = Usage::default();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let metadata = match entry.metadata() {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            usage.bytes += metadata.blocks() * 512;
            usage.inodes += 1;
            if metadata.is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    Ok(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_files_count_what_they_take_and_missing_folders_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(dir.path().join("scratch")).unwrap();
        file.set_len(1 << 30).unwrap();
        let usage = walk(dir.path()).unwrap();
        assert_eq!(usage.inodes, 1);
        assert!(usage.bytes < 1 << 20, "{usage:?}");
        assert_eq!(walk(&dir.path().join("missing")).unwrap(), Usage::default());
    }
}
