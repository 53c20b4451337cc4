# A server that initialises and unseals itself, and keeps its content on the node. NAMESPACE, AUDIENCE
# and ADDRESS are replaced.
ui = false
storage "file" {
  path = "/openbao/data"
}
listener "tcp" {
  address     = "ADDRESS"
  tls_disable = true
}
seal "static" {
  current_key_id = "1"
  current_key    = "6f70656e62616f206b65792c206f66203332206279746573202d2d2d2d2d2d2d"
}

initialize "secrets" {
  request "engine" {
    operation = "update"
    path      = "sys/mounts/secret"
    data      = { type = "kv", options = { version = "2" } }
  }
  request "policy" {
    operation = "update"
    path      = "sys/policies/acl/shop"
    data      = { policy = "path \"secret/data/*\" { capabilities = [\"read\"] }" }
  }
}
initialize "logins" {
  request "kubernetes" {
    operation = "update"
    path      = "sys/auth/kubernetes"
    data      = { type = "kubernetes" }
  }
  # The authority and the token of the server's own account are in its pod.
  request "cluster" {
    operation = "update"
    path      = "auth/kubernetes/config"
    data = {
      kubernetes_host = { eval_type = "string", eval_source = "env", env_var = "KUBERNETES" }
    }
  }
  # For tokens of kubelet.
  request "shop" {
    operation = "update"
    path      = "auth/kubernetes/role/shop"
    data = {
      bound_service_account_names      = ["default"]
      bound_service_account_namespaces = ["NAMESPACE"]
      audience                         = "AUDIENCE"
      token_policies                   = ["shop"]
    }
  }
  request "elsewhere" {
    operation = "update"
    path      = "auth/kubernetes/role/elsewhere"
    data = {
      bound_service_account_names      = ["default"]
      bound_service_account_namespaces = ["elsewhere"]
      audience                         = "AUDIENCE"
      token_policies                   = ["shop"]
    }
  }
  request "administrator" {
    operation = "update"
    path      = "auth/token/create-orphan"
    data      = { id = "administrator", policies = ["root"] }
  }
}
