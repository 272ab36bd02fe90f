//! One line per RPC of ImageService: which function answers, or that none does yet.

use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

use crate::proto::image_service_server::ImageService;
use crate::proto::*;
use crate::service::{CriService, answer, unimplemented};

#[tonic::async_trait]
impl ImageService for CriService {
    type StreamImagesStream = BoxStream<StreamImagesResponse>;

    async fn list_images(
        &self,
        request: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        answer("ListImages", async { self.list_images(request.into_inner()) }).await
    }

    async fn stream_images(
        &self,
        _request: Request<StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        unimplemented("StreamImages")
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
