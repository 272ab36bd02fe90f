//! One line per RPC of ImageService: which function answers.

use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

use crate::batches::batches;
use crate::proto::image_service_server::ImageService;
use crate::proto::*;
use crate::service::{CriService, answer};

#[tonic::async_trait]
impl ImageService for CriService {
    type StreamImagesStream = BoxStream<StreamImagesResponse>;

    async fn list_images(
        &self,
        request: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        answer("ListImages", async {
            Ok(ListImagesResponse { images: self.list_images(request.into_inner().filter)? })
        })
        .await
    }

    async fn stream_images(
        &self,
        request: Request<StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        answer("StreamImages", async {
            let items = self.list_images(request.into_inner().filter)?;
            Ok(batches(items, |images| StreamImagesResponse { images }))
        })
        .await
    }

    async fn image_status(
        &self,
        request: Request<ImageStatusRequest>,
    ) -> Result<Response<ImageStatusResponse>, Status> {
        answer("ImageStatus", async { self.image_status(request.into_inner()) }).await
    }

    async fn pull_image(
        &self,
        request: Request<PullImageRequest>,
    ) -> Result<Response<PullImageResponse>, Status> {
        answer("PullImage", self.pull_image(request.into_inner())).await
    }

    async fn remove_image(
        &self,
        request: Request<RemoveImageRequest>,
    ) -> Result<Response<RemoveImageResponse>, Status> {
        answer("RemoveImage", self.remove_image(request.into_inner())).await
    }

    async fn image_fs_info(
        &self,
        request: Request<ImageFsInfoRequest>,
    ) -> Result<Response<ImageFsInfoResponse>, Status> {
        answer("ImageFsInfo", self.image_fs_info(request.into_inner())).await
    }
}
