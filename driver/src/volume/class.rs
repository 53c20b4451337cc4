//! Reads the class of a published volume.

use std::{sync::Arc, time::Duration};

use super::{PublishRequest, Volumes};
use crate::{
    cluster::{Class, Freshness, Wanted},
    error::{Error, Result},
    record::{Age, ClassState, Record},
};

impl Volumes {
    /// Returns the planned time between two reads of the class of a volume.
    pub(super) fn between_reads(&self, known: &ClassState, request: &PublishRequest) -> Duration {
        let intervals = &self.policy.intervals;
        match request.every {
            None => intervals.between_reads_of(Some(known)),
            every => intervals.between_reads(every),
        }
    }

    /// Returns the class for a look. Where nothing is to be done as far as is known, the look does not wait for
    /// an API server that is slow or away: it goes on with an error, and a later look takes the answer.
    pub(super) async fn class_for_look(
        &self,
        record: &Record,
        request: &PublishRequest,
        known: &ClassState,
        freshness: Freshness,
    ) -> Result<Arc<Class>> {
        let now = self.clock.now();
        let due = self.policy.due(record, &record.class, request.every, now);
        let is_idle =
            matches!(due, Ok(None)) || self.failing.waits(&request.volume_id, None).is_some();
        if !is_idle || !matches!(freshness, Freshness::Within(_)) {
            return self.class_since(request, known, freshness, false).await;
        }
        let (namespace, name) = (&request.pod.namespace, &request.class);
        let wanted = Wanted {
            freshness,
            known: Some(known),
            with_parameters: false,
        };
        let class = self.cluster.class_in_time(namespace, name, &wanted).await?;
        Ok(settled(class, known))
    }

    /// Returns the class, at least as new as the known state if the API server has that.
    async fn class_since(
        &self,
        request: &PublishRequest,
        known: &ClassState,
        freshness: Freshness,
        with_parameters: bool,
    ) -> Result<Arc<Class>> {
        let (namespace, name) = (&request.pod.namespace, &request.class);
        let wanted = Wanted {
            freshness,
            known: Some(known),
            with_parameters,
        };
        let class = self.cluster.known_class(namespace, name, &wanted).await?;
        Ok(settled(class, known))
    }

    /// Returns a class with its parameters, which are not remembered if they are large.
    pub(super) async fn with_parameters(
        &self,
        class: Arc<Class>,
        request: &PublishRequest,
    ) -> Result<Arc<Class>> {
        if !class.parameters.is_empty() {
            return Ok(class);
        }
        let known = &class.identity;
        let whole = self
            .class_since(request, known, Freshness::Afresh, true)
            .await?;
        if whole.identity.age(known) == Age::OlderContent {
            return Err(Error::unavailable(format!(
                "the API server answers with an older state of SecretProviderClass {}/{} than a moment before; trying again",
                request.pod.namespace, request.class
            )));
        }
        Ok(whole)
    }
}

/// Returns a class with the annotations that are known, if those are newer. The content is the same then.
fn settled(class: Arc<Class>, known: &ClassState) -> Arc<Class> {
    if class.identity.age(known) != Age::OlderMetadata {
        return class;
    }
    Arc::new(Class {
        identity: known.clone(),
        ..Class::clone(&class)
    })
}
