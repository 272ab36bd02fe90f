//! Images and credentials.

use a3s_box_image::{ImageRecord, RegistryAuth};

use super::unsorted;
use crate::proto::{AuthConfig, Image, ImageSpec, Int64Value};

/// An image as lists and statuses show it.
pub fn image(record: &ImageRecord) -> Image {
    let (uid, username) = image_user(&record.config.user);
    Image {
        id: record.id.clone(),
        repo_tags: record.repo_tags.clone(),
        repo_digests: record.repo_digests.clone(),
        size: record.size,
        uid,
        username,
        spec: Some(ImageSpec { annotations: unsorted(&record.annotations), ..Default::default() }),
        pinned: record.pinned,
    }
}

/// Kubelet checks runAsNonRoot by this: a number where the image has one, else its name. The group
/// that may follow is none of its business.
fn image_user(user: &str) -> (Option<Int64Value>, String) {
    let user = user.split(':').next().unwrap_or_default();
    match user.parse::<u32>() {
        Ok(uid) => (Some(Int64Value { value: uid.into() }), String::new()),
        Err(_) => (None, user.to_owned()),
    }
}

/// Credentials of a pull.
pub fn auth(config: AuthConfig) -> RegistryAuth {
    RegistryAuth {
        username: config.username,
        password: config.password,
        auth: config.auth,
        server_address: config.server_address,
        identity_token: config.identity_token,
        registry_token: config.registry_token,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_images_user_is_a_number_or_a_name_and_never_a_group() {
        assert_eq!(image_user(""), (None, String::new()));
        assert_eq!(image_user("www:staff"), (None, "www".to_owned()));
        assert_eq!(image_user("1000:2000"), (Some(Int64Value { value: 1000 }), String::new()));
        assert_eq!(image_user("0"), (Some(Int64Value { value: 0 }), String::new()));
    }
}
